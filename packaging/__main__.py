"""What the service runs: python3 /usr/lib/replicas-engine, the directory that this file lies in.

Python compiles a script at every start, and keeps its syntax tree for as long as it runs. A module
that is imported has its bytecode beside it (replicas-engine-setup, as root, wrote it there): the
engine starts in less time, and in less memory.
"""

import sys

from replicas_engine import main

sys.exit(main(sys.argv[1:]))
