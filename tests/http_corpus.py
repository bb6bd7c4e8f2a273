"""Requests as raw bytes: malformed ones, and valid ones that look odd.

From the rules of RFC 9110 and 9112 and from published advisories on request smuggling.  Each
carries the right secret where a head can carry it, so that nothing is refused for want of it.

MALFORMED: {name: bytes}.  The answer is one 4xx or 501, and the connection is closed.
VALID: {name: (bytes, status, part of the answer's body or b"")}.  The connection stays in step,
unless its name ends in ", closes".  A tuple is of statuses that are all right.
"""

from harness import SECRET

KEY = b"X-Replicas-Engine-Secret: " + SECRET.encode()
HOST = b"Host: localhost"
PING = b"GET /ping HTTP/1.1\r\n" + HOST + b"\r\n" + KEY + b"\r\n\r\n"
SEND = b"POST /codex/send HTTP/1.1"
CHUNKED = b"Transfer-Encoding: chunked"
WANTED = b"Message is required"             # what /codex/send says when it could read {}


def head(line=b"GET /ping HTTP/1.1", *fields, host=HOST):
    return b"\r\n".join([line, host, KEY] + list(fields)) + b"\r\n\r\n"


def post(*fields, body=b"", line=SEND):
    return head(line, *fields) + body


def chunks(body, *fields):
    return post(CHUNKED, *fields, body=body)


MALFORMED, VALID = {}, {}


def malformed(**cases):
    for name, data in cases.items():
        assert name not in MALFORMED
        MALFORMED[name] = data


def series(prefix, make, *values):
    for number, value in enumerate(values, 1):
        name = "%s_%02d" % (prefix, number)
        assert name not in MALFORMED
        MALFORMED[name] = make(value)


# Two ways to find the end of a body

malformed(
    cl_te=post(b"Content-Length: 6", CHUNKED, body=b"0\r\n\r\nG"),
    te_cl=post(CHUNKED, b"Content-Length: 4", body=b"5c\r\nGPOST / HTTP/1.1\r\n\r\n0\r\n\r\n"),
    cl_te_zero=post(b"Content-Length: 0", CHUNKED, body=b"0\r\n\r\n"),
    te_cl_in_get=head(b"GET /ping HTTP/1.1", CHUNKED, b"Content-Length: 3") + b"0\r\n\r\n",
    cl_te_on_health=head(b"GET /health HTTP/1.1", b"Content-Length: 5", CHUNKED) + b"0\r\n\r\n",
    te_te_identity=post(CHUNKED, b"Transfer-Encoding: identity", body=b"0\r\n\r\n"),
    te_te_cow=post(CHUNKED, b"Transfer-encoding: cow", body=b"5\r\nhello\r\n0\r\n\r\n"),
    te_twice=post(CHUNKED, CHUNKED, body=b"0\r\n\r\n"),
    te_empty_and_chunked=post(b"Transfer-Encoding:", CHUNKED, body=b"0\r\n\r\n"),
    te_in_http_1_0=head(b"POST /codex/send HTTP/1.0", CHUNKED) + b"0\r\n\r\n",
    te_in_http_1_0_keep_alive=head(b"POST /codex/send HTTP/1.0", CHUNKED, b"Connection: keep-alive")
    + b"0\r\n\r\n",
    te_cl_in_http_1_0=head(b"POST /codex/send HTTP/1.0", CHUNKED, b"Content-Length: 5")
    + b"0\r\n\r\n",
    te_connection_names_it=post(CHUNKED, b"Content-Length: 2", b"Connection: Content-Length",
                                body=b"{}"),
    te_space_before_colon=post(b"Transfer-Encoding : chunked", b"Content-Length: 2", body=b"{}"),
    te_folded=post(b"Transfer-Encoding:\r\n chunked", body=b"0\r\n\r\n"),
    te_folded_tab=post(b"Transfer-Encoding:\r\n\tchunked", b"Content-Length: 2", body=b"{}"),
    te_in_folded_line=post(b"X: y\r\n Transfer-Encoding: chunked", body=b"0\r\n\r\n"),
    te_behind_bare_lf=post(b"X: y\nTransfer-Encoding: chunked", body=b"0\r\n\r\n"),
    te_behind_bare_cr=post(b"X: y\rTransfer-Encoding: chunked", body=b"0\r\n\r\n"),
    te_with_leading_space=post(b" Transfer-Encoding: chunked", b"Content-Length: 2", body=b"{}"),
    te_with_nul=post(b"Transfer-Encoding: chunked\0", body=b"0\r\n\r\n"),
    te_name_with_nul=post(b"Transfer-Encoding\0: chunked", b"Content-Length: 2", body=b"{}"),
    te_name_in_quotes=post(b'"Transfer-Encoding": chunked', b"Content-Length: 2", body=b"{}"),
    te_name_with_cr=post(b"Transfer-Encoding\r: chunked", b"Content-Length: 2", body=b"{}"),
    te_name_with_vt=post(b"Transfer-Encoding\x0b: chunked", b"Content-Length: 2", body=b"{}"),
    cl_0_then_request=post(b"Content-Length: 0", b"Content-Length: 44", body=PING),
    cl_0_hidden=post(b"Content-Length : 5", body=b"hello"),
    cl_dot_te=post(b"Content-Length: 2", b"Transfer-Encoding: \x0cchunked", body=b"{}"),
    cl_twice_differing=post(b"Content-Length: 5", b"Content-Length: 6", body=b"hello!"),
    cl_twice_same=post(b"Content-Length: 2", b"Content-Length: 2", body=b"{}"),
    cl_twice_other_case=post(b"Content-Length: 2", b"content-length: 3", body=b"{} "),
    cl_folded=post(b"Content-Length:\r\n 2", body=b"{}"),
    cl_folded_behind=post(b"Content-Length: 2\r\n 3", body=b"{}"),
)
series("te_value", lambda value: post(b"Transfer-Encoding: " + value, body=b"0\r\n\r\n"),
       b"xchunked", b"chunkedx", b"chunked, identity", b"identity", b"identity, chunked",
       b"gzip, chunked", b"gzip", b"chunked, chunked", b"chunked,", b",chunked", b"chunked;q=1",
       b"chunked; a=b", b"\"chunked\"", b"'chunked'", b"\x0bchunked", b"\x0cchunked",
       b"chunked\x0b", b"chunked\xa0", b"\x85chunked", b"chunked chunked", b"", b"chunk",
       b"chunKed\xc4\xb1", b"deflate", b"trailers, chunked", b"cow", b"chunked\tfoo", b"c\0hunked")
series("cl_value", lambda value: post(b"Content-Length: " + value, body=b"{}   "),
       b"+2", b"-1", b"-0", b"0x5", b"5 5", b"5,5", b"5, 5", b"5, 6", b"", b" ", b"\xd9\xa5",
       b"\xc2\xb2", b"5\xb2", b"5.0", b"5e0", b"5;", b"\"5\"", b"five", b"5\0", b"1_0", b"0b1",
       b"2 ,", b",2", b"\x0b2", b"2\x0c", b"99999999999999999999", b"18446744073709551618",
       b"9" * 5000, b"0" * 5000 + b"9" * 19, b"0" * 5000 + b"x", b"NaN", b"2\t2", b"\xff")

# Chunks

malformed(
    chunk_size_0x=chunks(b"0x2\r\n{}\r\n0\r\n\r\n"),
    chunk_size_plus=chunks(b"+2\r\n{}\r\n0\r\n\r\n"),
    chunk_size_minus=chunks(b"-2\r\n{}\r\n0\r\n\r\n"),
    chunk_size_underscore=chunks(b"0_2\r\n{}\r\n0\r\n\r\n"),
    chunk_size_empty=chunks(b"\r\n{}\r\n0\r\n\r\n"),
    chunk_size_missing_with_ext=chunks(b";a=b\r\n{}\r\n0\r\n\r\n"),
    chunk_size_no_hex=chunks(b"g\r\n{}\r\n0\r\n\r\n"),
    chunk_size_space_before=chunks(b" 2\r\n{}\r\n0\r\n\r\n"),
    chunk_size_space_behind=chunks(b"2 \r\n{}\r\n0\r\n\r\n"),
    chunk_size_tab_behind=chunks(b"2\t\r\n{}\r\n0\r\n\r\n"),
    chunk_size_vt_behind=chunks(b"2\x0b\r\n{}\r\n0\r\n\r\n"),
    chunk_size_nul=chunks(b"2\0\r\n{}\r\n0\r\n\r\n"),
    chunk_size_two=chunks(b"2 2\r\n{}\r\n0\r\n\r\n"),
    chunk_size_comma=chunks(b"2,2\r\n{}\r\n0\r\n\r\n"),
    chunk_size_dot=chunks(b"2.0\r\n{}\r\n0\r\n\r\n"),
    chunk_size_h=chunks(b"2h\r\n{}\r\n0\r\n\r\n"),
    chunk_size_arabic=chunks(b"\xd9\xa2\r\n{}\r\n0\r\n\r\n"),
    chunk_size_17_digits=chunks(b"10000000000000002\r\n{}\r\n0\r\n\r\n"),
    chunk_size_17_zeros_and_17_digits=chunks(b"0" * 17 + b"10000000000000002\r\n{}\r\n0\r\n\r\n"),
    chunk_size_overlong=chunks(b"0" * 5000 + b"2\r\n{}\r\n0\r\n\r\n"),
    chunk_size_lf=chunks(b"2\n{}\r\n0\r\n\r\n"),
    chunk_size_cr=chunks(b"2\r{}\r\n0\r\n\r\n"),
    chunk_size_crcrlf=chunks(b"2\r\r\n{}\r\n0\r\n\r\n"),
    chunk_data_lf=chunks(b"2\r\n{}\n0\r\n\r\n"),
    chunk_data_cr=chunks(b"2\r\n{}\r0\r\n\r\n"),
    chunk_data_without_crlf=chunks(b"2\r\n{}0\r\n\r\n"),
    chunk_data_longer=chunks(b"2\r\n{}}\r\n0\r\n\r\n"),
    chunk_data_shorter=chunks(b"3\r\n{}\r\n0\r\n\r\n"),
    chunk_data_two_crlf=chunks(b"2\r\n{}\r\n\r\n0\r\n\r\n"),
    chunk_last_lf=chunks(b"2\r\n{}\r\n0\n\r\n"),
    chunk_end_lf=chunks(b"2\r\n{}\r\n0\r\n\n"),
    chunk_end_lf_lf=chunks(b"2\r\n{}\r\n0\n\n"),
    chunk_end_spill=chunks(b"2\r\n{}\r\n0\r\nGET /ping HTTP/1.1\r\n\r\n"),
    chunk_end_cr=chunks(b"2\r\n{}\r\n0\r\n\rX\r\n"),
    chunk_terminator_is_spill=chunks(b"2\r\n{}XX0\r\n\r\n"),
    chunk_last_with_sign=chunks(b"2\r\n{}\r\n-0\r\n\r\n"),
    chunk_last_with_0x=chunks(b"2\r\n{}\r\n0x0\r\n\r\n"),
    chunk_ext_in_every_chunk=chunks((b"1;" + b"a" * 4000 + b"\r\n \r\n") * 5000 + b"0\r\n\r\n"),
    chunk_ext_in_some_chunks=chunks((b"1;a=" + b"b" * 90 + b"\r\n \r\n") * 300 + b"0\r\n\r\n"),
    chunk_zeros_in_every_chunk=chunks((b"0" * 100 + b"1\r\n \r\n") * 300 + b"0\r\n\r\n"),
)
series("chunk_ext", lambda value: chunks(b"2" + value + b"\r\n{}\r\n0\r\n\r\n"),
       b";", b";;", b"; ", b";a;", b";=b", b";a=", b";a=\"", b";a=\"b", b";a=b\"", b";a=\"b\"c",
       b";a b", b";a=b c", b";a=b ", b";a\x00", b";a\rb", b";a\nb", b";a=\"\r\"", b";a=\"\n\"",
       b";a=\"\x00\"", b";a=\"\x7f\"", b";a=\"\\\x01\"", b";a\x0b=b", b";\xe4=b", b";a=\xe4",
       b";a=(b)", b" a", b"a;b=\"c\\\"", b";a,b", b"; a=b==", b";" + b"a" * 5000,
       b";a=\"" + b"b" * 5000 + b"\"", b";a" * 3000)
series("trailer", lambda value: chunks(b"2\r\n{}\r\n0\r\n" + value + b"\r\n\r\n"),
       b"Content-Length: 5", b"content-length:0", b"Transfer-Encoding: chunked", b"Host: other",
       b"Authorization: Bearer x", KEY, b"Content-Type: text/plain", b"Content-Encoding: gzip",
       b"Content-Range: bytes 0-1/2", b"Trailer: X", b"TE: trailers", b"Connection: close",
       b"Expect: 100-continue", b"no colon", b": x", b"X : y", b" X: y", b"X: y\r\n z", b"X: \0",
       b"X: \x7f", b"X\ny: z", b"X: y\nZ: a", b"X: y\rZ: a", b"X(): y", b"\xe4: y", b"X: \x1b",
       b"X: " + b"y" * 9000, b"\r\n".join([b"X: " + b"y" * 500] * 20), b"X y: z", b"\"X\": y")

# Request lines

series("line", lambda value: head(value),
       b"GET  /ping HTTP/1.1", b"GET /ping  HTTP/1.1", b" GET /ping HTTP/1.1",
       b"GET /ping HTTP/1.1 ", b"GET\t/ping HTTP/1.1", b"GET /ping\tHTTP/1.1",
       b"\tGET /ping HTTP/1.1", b"GET /ping HTTP/1.1\t", b"GET\x0b/ping HTTP/1.1",
       b"GET\x0c/ping\x0cHTTP/1.1", b"GET\xa0/ping\xa0HTTP/1.1", b"GET /ping http/1.1",
       b"GET /ping Http/1.1", b"GET /ping HTTP/0.9", b"GET /ping HTTP/2.0", b"GET /ping HTTP/2",
       b"GET /ping HTTP/3", b"GET /ping HTTP/1", b"GET /ping HTTP/1.", b"GET /ping HTTP/.1",
       b"GET /ping HTTP/1.1x", b"GET /ping HTTP/1.10", b"GET /ping HTTP/01.1",
       b"GET /ping HTTP/1.01", b"GET /ping HTTP/1,1", b"GET /ping HTTP/+1.1",
       b"GET /ping HTTP/1.-1", b"GET /ping HTTP/1 .1", b"GET /ping HTTP 1.1",
       b"GET /ping HTTP/11", b"GET /ping HTTP/\xd9\xa1.1", b"GET /ping HTTPS/1.1",
       b"GET /ping ICY/1.1", b"GET /ping HTP/1.1", b"GET /ping HTTP/1.1 HTTP/1.1",
       b"GET /ping /ping HTTP/1.1", b"GET /ping x HTTP/1.1", b"GET /ping", b"GET /ping ", b"GET",
       b"GET HTTP/1.1", b"GET  HTTP/1.1", b"HTTP/1.1 GET /ping", b"HTTP/1.1 200 OK",
       b"GET /ping HTTP/1.1\0", b"\0GET /ping HTTP/1.1")
series("method", lambda value: head(value + b" /ping HTTP/1.1"),
       b"G(T", b"GET,", b"GET:", b"GET;", b"G=T", b"G?T", b"G@T", b"G[T", b"G\\T", b"G]T", b"G{T",
       b"G}T", b"G\"T", b"G/T", b"<GET>", b"G\x01T", b"G\x7fT", b"G\xc3\x89T", b"\xef\xbb\xbfGET",
       b"G\0T", b"", b"\r", b"\x16\x03\x01")
series("target", lambda value: head(b"GET " + value + b" HTTP/1.1"),
       b"ping", b"/ping#top", b"#", b"/%", b"/%4", b"/%zz", b"/ping%",
       b"/ping?a#b", b"/p\x01ing", b"/p\x7fing", b"/p\xc3\xa4ng", b"/p\0ing", b"/ping\\x",
       b"\\ping", b"/pi{ng", b"/pi|ng", b"/pi^ng", b"/pi`ng", b"/pi\"ng", b"/<ping>",
       b"*", b"?a", b"http:/ping",
       b"http:ping", b"http://", b"http:///ping", b"http://?a", b"http://:80/ping",
       b"http://other/ping", b"http://localhost:81/ping", b"http://localhost.other/ping",
       b"http://user@localhost/ping", b"http://user:pw@localhost/ping",
       b"http://@localhost/ping", b"http://localhost@other/ping",
       b"http://localhost#@other/ping", b"http://localhost\\@other/ping",
       b"http://localhost:80:80/ping", b"http://localhost:99999/ping",
       b"http://localhost:x/ping", b"http://localhost,other/ping", b"http://[::1/ping",
       b"http://[::1]x/ping", b"http://[]/ping", b"http://localhost/ping#x",
       b"http://localhost/pi%ng", b"https://localhost/ping", b"ftp://localhost/ping",
       b"file:///ping", b"javascript:1", b"localhost:80", b"localhost",
       b"http://loc%zzalhost/ping", b"://localhost/ping")
malformed(
    connect=head(b"CONNECT localhost:80 HTTP/1.1"),
    connect_origin_form=head(b"CONNECT /ping HTTP/1.1"),
    connect_other=head(b"CONNECT example.com:443 HTTP/1.1", host=b"Host: example.com:443"),
    post_asterisk=head(b"POST * HTTP/1.1", b"Content-Length: 0"),
    http_0_9=b"GET /health\r\n",
    http_0_9_lf=b"GET /health\n",
    http_0_9_with_version=b"GET /health HTTP/0.9\r\n\r\n",
    line_too_long=head(b"GET /" + b"x" * 8192 + b" HTTP/1.1"),
    line_too_long_query=head(b"GET /ping?" + b"x" * 20000 + b" HTTP/1.1"),
    line_far_too_long=head(b"GET /" + b"x" * 200000 + b" HTTP/1.1"),
    line_without_end=b"GET /" + b"x" * 200000,
    method_too_long=head(b"G" * 9000 + b" /ping HTTP/1.1"),
    lf_only=head().replace(b"\r\n", b"\n"),
    lf_only_line=head().replace(b"\r\n", b"\n", 1),
    lf_only_last=head()[:-2] + b"\n",
    lf_only_lf_lf=head()[:-4] + b"\n\n",
    cr_only=head().replace(b"\r\n", b"\r") + b"\r\n\r\n",
    lf_before_request=b"\n" + head(),
    cr_before_request=b"\r" + head(),
    cr_cr_lf=head().replace(b"\r\n", b"\r\r\n"),
    lf_cr=head().replace(b"\r\n", b"\n\r"),
    space_line_before_request=b" \r\n" + head(),
    nul_before_request=b"\0" + head(),
    bom_before_request=b"\xef\xbb\xbf" + head(),
    spill_before_request=b"hello\r\n" + head(),
    h2_preface=b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\0\0\x12\4\0\0\0\0\0",
    tls_hello=b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(range(256)) * 2,
    tls_hello_short=b"\x16\x03\x01\x00\xa5",
    ssl2_hello=b"\x80\x2e\x01\x03\x01\0\x15\0\0\0\x10",
    ssh_banner=b"SSH-2.0-OpenSSH_9.6\r\n",
    smtp=b"EHLO localhost\r\n",
    sip=b"OPTIONS sip:a@b SIP/2.0\r\nVia: x\r\n\r\n",
    rtsp=b"DESCRIBE rtsp://localhost/ping RTSP/1.0\r\nCSeq: 1\r\n\r\n",
    redis=b"*1\r\n$4\r\nPING\r\n",
    socks=b"\5\1\0",
    proxy_protocol=b"PROXY TCP4 1.2.3.4 5.6.7.8 1 2\r\n" + head(),
    proxy_protocol_2=b"\r\n\r\n\0\r\nQUIT\n" + head(),
    json=b'{"message":"hello"}\r\n\r\n',
    response=b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n",
    nuls=b"\0" * 100,
)

# Fields

malformed(
    host_missing=b"GET /ping HTTP/1.1\r\n" + KEY + b"\r\n\r\n",
    host_missing_on_health=b"GET /health HTTP/1.1\r\n\r\n",
    host_missing_absolute_form=b"GET http://localhost/ping HTTP/1.1\r\n" + KEY + b"\r\n\r\n",
    host_twice=head(b"GET /ping HTTP/1.1", HOST),
    host_twice_differing=head(b"GET /ping HTTP/1.1", b"host: other"),
    host_twice_http_1_0=head(b"GET /ping HTTP/1.0", b"Host: other"),
    host_folded=head(host=b"Host:\r\n localhost"),
    host_behind_space=head(host=b" Host: localhost"),
    host_space_before_colon=head(host=b"Host : localhost"),
    secret_behind_fold=b"GET /ping HTTP/1.1\r\nHost: localhost\r\nX: y\r\n " + KEY + b"\r\n\r\n",
    first_field_folded=b"GET /ping HTTP/1.1\r\n X: y\r\nHost: localhost\r\n" + KEY + b"\r\n\r\n",
    first_field_tab=b"GET /ping HTTP/1.1\r\n\tHost: localhost\r\n" + KEY + b"\r\n\r\n",
    fields_101=head(b"GET /ping HTTP/1.1", *[b"X-%d: y" % n for n in range(99)]),
    fields_1000=head(b"GET /ping HTTP/1.1", *[b"X: y"] * 1000),
    fields_too_large=head(b"GET /ping HTTP/1.1", b"X: " + b"y" * 33000),
    fields_far_too_large=head(b"GET /ping HTTP/1.1", b"X: " + b"y" * 300000),
    fields_too_large_together=head(b"GET /ping HTTP/1.1", *[b"X: " + b"y" * 1000] * 40),
    field_without_end=head()[:-2] + b"X: " + b"y" * 100000,
    field_name_too_large=head(b"GET /ping HTTP/1.1", b"X" * 40000 + b": y"),
)
series("host", lambda value: head(host=b"Host: " + value),
       b"a b", b"a/b", b"a?b", b"a#b", b"user@a", b"http://a", b"a:b", b"a:80:80", b"a:-1",
       b"a:+80", b"a:65536", b"a:999999", b"a:000065536", b"a:" + b"9" * 5000, b"a:0x50",
       b"a: 80", b"a :80", b"[::1", b"::1", b"[::1]x",
       b"[::1]:x", b"[::g]", b"[1.2.3.4]", b"[]", b"[::1]]", b"[:::]", b"[1::2::3]", b"[v1.a]",
       b"[fe80::1%eth0]", b"a\\b", b"a\"b", b"<a>", b"a|b", b"a^b", b"a%", b"a%g0", b"\xe4",
       b"a\0b", b"a\x01", b"a\x7f", b"{a}", b"a`b", b"a, a", b"a\tb", b"[[::1]]")
series("field", lambda value: head(b"GET /ping HTTP/1.1", value),
       b"X : y", b"X\t: y", b" X: y", b"\tX: y", b"X", b"no colon here", b": y", b":", b" : y",
       b"X y: z", b"X\x00: y", b"X\x01: y", b"X\x7f: y", b"X(y): z", b"X,y: z", b"X/y: z",
       b"X;y: z", b"X<y: z", b"X=y: z", b"X>y: z", b"X?y: z", b"X@y: z", b"X[y: z", b"X\\y: z",
       b"X]y: z", b"X{y: z", b"X}y: z", b"X\"y: z", b"\xc3\xa4: y", b"X\xa0: y", b"X: a\x00b",
       b"X: a\x01b", b"X: a\x08b", b"X: a\x0bb", b"X: a\x0cb", b"X: a\x1bb", b"X: a\x1fb",
       b"X: a\x7fb", b"X: a\rb", b"X: a\nb", b"X: a\n", b"X: a\r", b"X: a\r\n b", b"X: a\r\n\tb",
       b"X: a\r\n \r\n", b"X: a\n\nb", b"\rX: y", b"X:\x00", b"X\r: y", b"X\n: y",
       b"GET /ping HTTP/1.1", b"X: y\r\r\n", b"Expect: 200-ok", b"Expect: 100-continue, x",
       b"Expect: 100-continue-x", b"Expect: ,x", b"Expect: 100-continue\r\nExpect: x",
       b'Expect: x=",100-continue,"', b"Expect: 100-continue 100-continue")


# Valid

def valid(name, data, status=200, part=b""):
    assert name not in VALID
    VALID[name] = data, status, part


def ok(name, *fields, line=b"GET /ping HTTP/1.1", status=200, host=HOST):
    valid(name, head(line, *fields, host=host), status)


def body(name, *fields, data=b"{}", status=400, part=WANTED, line=SEND):
    valid(name, head(line, *fields) + data, status, part)


ok("plain")
ok("health", line=b"GET /health HTTP/1.1")
valid("health without secret", b"GET /health HTTP/1.1\r\nHost: a\r\n\r\n")
valid("one CRLF before", b"\r\n" + PING)
valid("five CRLF before", b"\r\n" * 5 + PING)
ok("1.2 is as good as 1.1", line=b"GET /ping HTTP/1.2")
ok("1.9 is as good as 1.1", line=b"GET /ping HTTP/1.9")
ok("1.0, closes", line=b"GET /ping HTTP/1.0")
ok("1.0 with keep-alive", b"Connection: keep-alive", line=b"GET /ping HTTP/1.0")
ok("1.0 with Keep-Alive in a list", b"Connection: x , Keep-Alive", line=b"GET /ping HTTP/1.0")
ok("1.0 with keep-alive and close, closes", b"Connection: keep-alive, close",
   line=b"GET /ping HTTP/1.0")
valid("1.0 without Host, closes", b"GET /ping HTTP/1.0\r\n" + KEY + b"\r\n\r\n")
valid("1.0 health without anything, closes", b"GET /health HTTP/1.0\r\n\r\n")
ok("1.0 with Expect is no expectation, closes", b"Expect: 100-continue",
   line=b"GET /ping HTTP/1.0")
ok("absolute-form", line=b"GET http://localhost/ping HTTP/1.1")
ok("absolute-form with port", line=b"GET http://localhost:3737/ping HTTP/1.1",
   host=b"Host: localhost:3737")
ok("absolute-form in capitals", line=b"GET HTTP://LOCALHOST/ping HTTP/1.1")
ok("absolute-form with the default port", line=b"GET http://localhost:80/ping HTTP/1.1")
ok("absolute-form with an empty port", line=b"GET http://localhost:/ping HTTP/1.1")
ok("absolute-form without a path", line=b"GET http://localhost HTTP/1.1", status=404)
ok("absolute-form with a query only", line=b"GET http://localhost?a HTTP/1.1", status=404)
ok("absolute-form with IPv6", line=b"GET http://[::1]:80/ping HTTP/1.1", host=b"Host: [::1]")
valid("absolute-form in 1.0 without Host, closes",
      b"GET http://localhost/ping HTTP/1.0\r\n" + KEY + b"\r\n\r\n")
ok("absolute-form of an absolute-form", line=b"GET http://localhost/http://localhost/ HTTP/1.1",
   status=404)
ok("asterisk", line=b"OPTIONS * HTTP/1.1", status=204)
ok("OPTIONS in absolute-form without a path", line=b"OPTIONS http://localhost HTTP/1.1",
   status=204)
ok("OPTIONS in absolute-form with a query", line=b"OPTIONS http://localhost?a HTTP/1.1", status=404)
ok("OPTIONS of a path", line=b"OPTIONS /ping HTTP/1.1", status=405)
ok("HEAD", line=b"HEAD /ping HTTP/1.1")
ok("HEAD of nothing", line=b"HEAD /nothing HTTP/1.1", status=404)
ok("lower-case method", line=b"get /ping HTTP/1.1", status=405)
ok("unknown method", line=b"BREW /ping HTTP/1.1", status=405)
ok("method of all token characters", line=b"!#$%&'*+-.^_`|~09azAZ /ping HTTP/1.1", status=405)
ok("DELETE", line=b"DELETE /ping HTTP/1.1", status=405)
ok("TRACE", line=b"TRACE /ping HTTP/1.1", status=405)
ok("PRI", line=b"PRI /ping HTTP/1.1", status=405)
ok("percent-encoded path", line=b"GET /%70in%67 HTTP/1.1")
ok("percent-encoded in small letters", line=b"GET /pin%67?%c3%a4 HTTP/1.1")
ok("percent-encoded slash", line=b"GET /ping%2Fx HTTP/1.1", status=404)
ok("percent-encoded NUL", line=b"GET /%00 HTTP/1.1", status=404)
ok("percent-encoded CR LF", line=b"GET /a%0d%0aX:%20y HTTP/1.1", status=404)
ok("percent-encoded bytes that are no UTF-8", line=b"GET /%ff%fe HTTP/1.1", status=404)
ok("two slashes", line=b"GET //ping HTTP/1.1", status=404)
ok("dots", line=b"GET /../ping HTTP/1.1", status=404)
ok("all path characters", line=b"GET /-._~!$&'()*+,;=:@/azAZ09 HTTP/1.1", status=404)
ok("all query characters", line=b"GET /ping?-._~!$&'()*+,;=:@/azAZ09/? HTTP/1.1")
ok("a query that RFC 3986 forbids", line=b"GET /ping?%&%g0&[\\]^`{|}\"<> HTTP/1.1")
ok("empty query", line=b"GET /ping? HTTP/1.1")
ok("two question marks", line=b"GET /ping?? HTTP/1.1")
ok("a URL as query", line=b"GET /ping?u=http://a/b?c HTTP/1.1")
ok("the longest request line", line=b"GET /ping?" + b"x" * (8192 - 19) + b" HTTP/1.1")
ok("empty Host", host=b"Host:")
ok("Host of spaces", host=b"Host: \t ")
ok("Host with OWS", host=b"Host:\t localhost \t")
ok("Host without space", host=b"Host:localhost")
ok("Host in capitals", host=b"HOST: LOCALHOST")
ok("Host with port", host=b"Host: localhost:3737")
ok("Host with an empty port", host=b"Host: localhost:")
ok("Host with a port of many digits", host=b"Host: localhost:000003737")
ok("Host with a port of very many digits", host=b"Host: localhost:" + b"0" * 5000 + b"80")
ok("Host with port 0", host=b"Host: localhost:0")
ok("absolute-form with leading zeros in its port",
   line=b"GET http://localhost:000080/ping HTTP/1.1")
ok("Host is IPv4", host=b"Host: 127.0.0.1:3737")
ok("Host is IPv6", host=b"Host: [::1]")
ok("Host is IPv6 with port", host=b"Host: [2001:db8::1]:3737")
ok("Host is IPv6 with IPv4", host=b"Host: [::ffff:1.2.3.4]")
ok("Host is percent-encoded", host=b"Host: a%20b")
ok("Host with all its characters", host=b"Host: a-._~!$&'()*+,;=z")
valid("Host comes last", b"GET /ping HTTP/1.1\r\n" + KEY + b"\r\nhOsT: localhost\r\n\r\n")
valid("names in capitals", b"GET /ping HTTP/1.1\r\nHOST: a\r\n" + KEY.replace(
    b"X-Replicas-Engine-Secret", b"X-REPLICAS-ENGINE-SECRET") + b"\r\n\r\n")
valid("names in small letters", b"GET /ping HTTP/1.1\r\nhost: a\r\n" + KEY.replace(
    b"X-Replicas-Engine-Secret", b"x-replicas-engine-secret") + b"\r\n\r\n")
valid("secret with OWS", b"GET /ping HTTP/1.1\r\nHost: a\r\n"
      + KEY.replace(b": ", b":\t  ") + b" \t \r\n\r\n")
valid("secret as bearer", b"GET /ping HTTP/1.1\r\nHost: a\r\nauthorization: bEARER "
      + SECRET.encode() + b"\r\n\r\n")
ok("empty value", b"X:")
ok("value of spaces", b"X:  \t  ")
ok("value with tabs", b"X: a\tb\t\tc")
ok("value with obs-text", b"X: \x80\xe4\xff")
ok("value with colons", b"X: :a:b:")
ok("value with everything visible", b"X: " + bytes(range(0x21, 0x7f)))
ok("name of all token characters", b"!#$%&'*+-.^_`|~09azAZ: y")
ok("name of one character", b"~: y")
ok("name with an underscore is passed over", b"Content_Length: 5", b"Transfer_Encoding: x")
ok("name that begins with a digit", b"1: y")
ok("a field twice", b"X: a", b"X: b")
ok("100 fields", *[b"X-%d: y" % n for n in range(98)])
ok("a long value", b"X: " + b"y" * 30000)
ok("a long name", b"X" * 30000 + b": y")
ok("names as in CGI", b"HTTP-HOST: y", b"Path-Info: /", b"Remote-User: root", b"wsgi.input: y")
ok("close, closes", b"Connection: close")
ok("Close in a list, closes", b"Connection: x,\tClose ,y")
ok("close in the second field, closes", b"Connection: x", b"Connection: close")
ok("close with commas, closes", b"Connection: ,,close,")
ok("Connection: keep-alive", b"Connection: keep-alive")
ok("Connection of something", b"Connection: closed, upgrade")
ok("empty Connection", b"Connection:")
ok("Upgrade is passed over", b"Connection: Upgrade, HTTP2-Settings", b"Upgrade: h2c",
   b"HTTP2-Settings: AAMAAABkAAQAAP__")
ok("TE", b"TE: trailers, deflate;q=0.5", b"Connection: TE")
ok("Expect without a body", b"Expect: 100-continue")
ok("empty Expect", b"Expect:")
ok("Expect with empty elements", b"Expect: , 100-continue ,,\t")
ok("Expect of empty elements", b"Expect: ,,")
ok("Expect twice", b"Expect: 100-continue", b"Expect: 100-Continue")
ok("Content-Length: 0", b"Content-Length: 0")
ok("Content-Length: 000", b"Content-Length: 000")
body("GET with a body", b"Content-Length: 5", data=b"hello", status=200, part=b"pong",
     line=b"GET /ping HTTP/1.1")
body("GET with a body that is a request", b"Content-Length: %d" % len(PING), data=PING, status=200,
     part=b"pong", line=b"GET /ping HTTP/1.1")
body("GET with a chunked body", CHUNKED, data=b"5\r\nhello\r\n0\r\n\r\n", status=200, part=b"pong",
     line=b"GET /ping HTTP/1.1")
body("404 with a body", b"Content-Length: 5", data=b"hello", status=404, part=b"Not found",
     line=b"POST /nothing HTTP/1.1")
body("404 with a chunked body", CHUNKED, data=b"5\r\nhello\r\n0\r\nX: y\r\n\r\n", status=404,
     part=b"Not found", line=b"POST /nothing HTTP/1.1")
body("405 with a body", b"Content-Length: 5", data=b"hello", status=405, part=b"allows",
     line=b"PUT /ping HTTP/1.1")
body("HEAD with a body", b"Content-Length: 5", data=b"hello", status=200, part=b"",
     line=b"HEAD /ping HTTP/1.1")
body("POST without a body", data=b"", part=b"not JSON")
body("Content-Length", b"Content-Length: 2")
body("Content-Length with leading zeros", b"Content-Length: 0000002")
body("Content-Length with 30 leading zeros", b"Content-Length: " + b"0" * 30 + b"2")
body("Content-Length with 9000 leading zeros", b"Content-Length: " + b"0" * 9000 + b"2")
ok("Content-Length of 9000 zeros", b"Content-Length: " + b"0" * 9000)
body("Content-Length with OWS", b"content-length:\t2 ")
body("Content-Length and Expect, but the body came at once", b"Content-Length: 2",
     b"EXPECT: 100-CONTINUE")
body("body with CRLF in it", b"Content-Length: 8", data=b"\r\n{\r\n}\r\n")
body("chunked", CHUNKED, data=b"2\r\n{}\r\n0\r\n\r\n")
body("chunked in capitals", b"TRANSFER-ENCODING:\tCHUNKED ", data=b"2\r\n{}\r\n0\r\n\r\n")
body("chunked in two", CHUNKED, data=b"1\r\n{\r\n1\r\n}\r\n0\r\n\r\n")
body("chunked in 300", CHUNKED, data=b"1\r\n \r\n" * 300 + b"2\r\n{}\r\n0\r\n\r\n")
body("chunked with leading zeros", CHUNKED, data=b"0000000002\r\n{}\r\n00000\r\n\r\n")
body("chunked in capital hex", CHUNKED, data=b"A\r\n{        }\r\n0\r\n\r\n")
body("chunked in small hex", CHUNKED, data=b"a\r\n{        }\r\n0\r\n\r\n")
body("chunked with 16 digits", CHUNKED, data=b"0000000000000002\r\n{}\r\n0\r\n\r\n")
body("chunked with 17 digits", CHUNKED, data=b"00000000000000002\r\n{}\r\n0\r\n\r\n")
body("chunked with 4000 digits", CHUNKED,
     data=b"0" * 3999 + b"2\r\n{}\r\n" + b"0" * 4000 + b"\r\n\r\n")
body("chunked byte by byte", CHUNKED, data=b"1\r\n \r\n" * 30000 + b"2\r\n{}\r\n0\r\n\r\n")
body("chunk extensions with enough data", CHUNKED,
     data=(b"64;a=" + b"b" * 90 + b"\r\n" + b" " * 100 + b"\r\n") * 1000 + b"2\r\n{}\r\n0\r\n\r\n")
body("chunk extension", CHUNKED, data=b"2;a\r\n{}\r\n0\r\n\r\n")
body("chunk extension with value", CHUNKED, data=b"2;a=b;c=d\r\n{}\r\n0;e\r\n\r\n")
body("chunk extension with BWS", CHUNKED, data=b"2 ;\ta = b ; c\t=\td\r\n{}\r\n0\r\n\r\n")
body("chunk extension quoted", CHUNKED, data=b'2;a="b;c, \t=\xe4"\r\n{}\r\n0\r\n\r\n')
body("chunk extension with escapes", CHUNKED, data=b'2;a="\\"\\\\\\a\\\t"\r\n{}\r\n0\r\n\r\n')
body("chunk extension that looks like a chunk", CHUNKED, data=b'2;a="0"\r\n{}\r\n0\r\n\r\n')
body("chunk extension empty quoted", CHUNKED, data=b'2;a=""\r\n{}\r\n0\r\n\r\n')
body("long chunk extension", CHUNKED, data=b"2;" + b"a" * 4000 + b"\r\n{}\r\n0\r\n\r\n")
body("trailer", CHUNKED, data=b"2\r\n{}\r\n0\r\nX-Sum: 5\r\n\r\n")
body("trailers", CHUNKED, b"Trailer: A, B", data=b"2\r\n{}\r\n0\r\nA:\r\nB: \xe4\t \r\n\r\n")
body("trailer with an underscore", CHUNKED, data=b"2\r\n{}\r\n0\r\nContent_Length: 5\r\n\r\n")
body("chunk data that looks like an end", CHUNKED,
     data=b"b\r\n\r\n0\r\n\r\n0\r\n\r\r\n0\r\n\r\n", part=b"not JSON")
valid("three in a row", PING * 3)
valid("CRLF between", PING + b"\r\n" + PING)
