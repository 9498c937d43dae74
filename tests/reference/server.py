"""A tiny OpenAI-compatible server, so that a client meets real HTTP."""

import json
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


@contextmanager
def reverse_server():
    """The server while the context lasts, with its ``url`` and what it was ``asked``."""
    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as running:
        running.asked = []
        running.url = f"http://127.0.0.1:{running.server_port}"
        thread = threading.Thread(target=running.serve_forever, args=(0.02,))
        thread.start()
        yield running
        running.shutdown()
        thread.join()


def loglikelihood(before, character):
    """Of a character after those before it, in the model "reverse"."""
    return -(1 + (ord(before[-1]) + 3 * ord(character)) % 11) / 8


class Handler(BaseHTTPRequestHandler):
    """An OpenAI-compatible server of the model "reverse": it answers with the prompt reversed, a token a character."""

    def log_message(self, *args):
        pass

    def do_GET(self):
        assert self.path == "/v1/models"
        self.reply(
            200, {"object": "list", "data": [{"id": "reverse", "object": "model", "created": 0, "owned_by": ""}]}
        )

    def do_POST(self):
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.asked.append(asked)
        chat = self.path == "/v1/chat/completions"
        prompt = asked["messages"][0]["content"] if chat else asked["prompt"]
        if prompt == "refuse":
            return self.reply(400, {"error": {"message": "too rude", "type": "BadRequestError", "code": 400}})
        text = prompt[::-1][: asked["max_tokens"]]
        answer = {"message": {"role": "assistant", "content": f"chat {text}"}} if chat else {"text": text}
        if asked.get("echo") and not prompt.startswith("mute"):
            answer = {"text": prompt + text, "logprobs": echoed(prompt + text)}
        choice = {"index": 0, "finish_reason": "stop", **answer}
        usage = {"prompt_tokens": len(prompt), "completion_tokens": len(text), "total_tokens": len(prompt + text)}
        content = {"id": "1", "object": "x", "created": 0, "model": "reverse", "choices": [choice]}
        return self.reply(200, content if prompt == "uncounted" else {**content, "usage": usage})

    def reply(self, status, content):
        body = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)


def echoed(text):
    """What the completions endpoint says of a text's tokens."""
    values = [None, *(loglikelihood(text[:n], text[n]) for n in range(1, len(text)))]
    return {"tokens": list(text), "token_logprobs": values, "text_offset": list(range(len(text)))}
