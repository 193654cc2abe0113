"""A server that speaks chat completions and fails in every way."""

import json
import re
import threading
import time
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

KEY = "sk-very-secret-0123456789"
# What it is asked for by the fixtures' command.
EXPECTED = [(f"q{i}", sample) for i in range(6) for sample in range(3)]


class Server:
    """Answers each request with a text of its own, or as `misbehave(request, number)` says.

    Attributes:
        requests: (body, authorization) of each request.
        answered: the question of each request that gets its answer in full.
    """

    def __init__(self):
        self.requests, self.answered = [], []
        self.misbehave = lambda body, number: None
        self.seconds = 0.0
        lock = threading.Lock()
        outer = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_POST(self):
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                with lock:
                    outer.requests.append((body, self.headers["Authorization"]))
                    number = len(outer.requests)
                time.sleep(outer.seconds)
                question = re.search(r"Question (\d+)", body["messages"][0]["content"][-1]["text"])
                what = outer.misbehave(body, number)
                if what == "hang":
                    time.sleep(8)
                    self.close_connection = True
                    return
                if isinstance(what, int):
                    text = json.dumps(
                        {"error": {"message": f"no: {self.headers['Authorization']}"}}
                    )
                    headers = {"Retry-After": "0"} if what == 429 else {}
                    return self.answer(what, text, headers)
                if isinstance(what, dict):
                    return self.answer(200, json.dumps(what), {})
                if what == "broken":
                    return self.answer(200, '{"choices": [', {})
                if what == "page":
                    return self.answer(200, "<html>", {}, "text/html")
                content = f"Thought {number}.\n\nAnswer: B"
                text = json.dumps(
                    {
                        "id": "x",
                        "object": "chat.completion",
                        "created": 0,
                        "model": body["model"],
                        "choices": [
                            {
                                "index": 0,
                                "finish_reason": "stop",
                                "message": {"role": "assistant", "content": content},
                            }
                        ],
                        "usage": {"prompt_tokens": 10, "completion_tokens": 5, "total_tokens": 15},
                    }
                )
                if what == "cut":
                    return self.answer(200, text, {"Content-Length": str(len(text) + 50)})
                outer.answered.append(question[1])  # before the client can have it
                self.answer(200, text, {})

            def answer(self, status, text, headers, kind="application/json"):
                self.send_response(status)
                length = {"Content-Length": str(len(text)), "Content-Type": kind}
                for name, value in (length | headers).items():
                    self.send_header(name, value)
                self.end_headers()
                with suppress(BrokenPipeError):  # the client was killed
                    self.wfile.write(text.encode())
                self.close_connection = True

            def log_message(self, *args):
                pass

        self._http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._http.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._http.server_port}/v1"
        threading.Thread(target=self._http.serve_forever, daemon=True).start()

    def close(self):
        self._http.shutdown()
        self._http.server_close()


def check_all_there(rows):
    """Each candidate is there, in order, and each is an answer of its own."""
    assert [(row["id"], row["sample"]) for row in rows] == EXPECTED
    assert len({row["response"] for row in rows}) == len(rows)
