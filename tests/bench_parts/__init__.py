"""What tests/bench measures, a module for each issue; each has a `run()`."""
