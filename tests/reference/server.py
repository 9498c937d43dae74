"""A tiny OpenAI-compatible server, so that a client meets real HTTP."""

import json
from http.server import BaseHTTPRequestHandler


class Handler(BaseHTTPRequestHandler):
    """An OpenAI-compatible server of the model "reverse": it answers with the prompt reversed."""

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
        choice = {"index": 0, "finish_reason": "stop", **answer}
        return self.reply(200, {"id": "1", "object": "x", "created": 0, "model": "reverse", "choices": [choice]})

    def reply(self, status, content):
        body = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)
