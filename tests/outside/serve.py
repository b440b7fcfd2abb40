"""Serves files by https, one folder a name, and at echo.test what it was asked."""

import http.server
import json
import os
import ssl
import sys

PORT, CERTIFICATE, KEY, ROOT = sys.argv[1:]


class Handler(http.server.SimpleHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    timeout = 60

    def translate_path(self, path):
        # What is asked for under one name is not there under another.
        name = self.headers.get("Host", "").split(":")[0]
        self.directory = os.path.join(os.path.abspath(ROOT), os.path.basename(name) or "none")
        return super().translate_path(path)

    def do_GET(self):
        if self.headers.get("Host", "").split(":")[0] != "echo.test":
            return super().do_GET()
        body = json.dumps({"path": self.path, "headers": dict(self.headers)}).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)


class Server(http.server.ThreadingHTTPServer):
    daemon_threads = True

    def finish_request(self, request, client_address):
        # In the connection's own thread: a client that is slow with it holds up nobody.
        request.settimeout(30)
        super().finish_request(context.wrap_socket(request, server_side=True), client_address)


context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
context.load_cert_chain(CERTIFICATE, KEY)
Server(("127.0.0.1", int(PORT)), Handler).serve_forever()
