"""Stands in for vLLM's server in tests: its health, its list of models, its adapters, and a process that it starts.

python vllm_stub.py PORT NAME CONTEXT [NAME=ADAPTER…]
"""

import json
import subprocess
import sys
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

PORT, NAME, CONTEXT, *MODULES = sys.argv[1:]
names = [NAME, *(module.split("=")[0] for module in MODULES)]


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        models = [{"id": name, "max_model_len": int(CONTEXT)} for name in names]
        self.say(200, {"data": models} if self.path == "/v1/models" else {})

    def do_POST(self) -> None:
        said = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if self.path == "/v1/load_lora_adapter":
            config = json.loads((Path(said["lora_path"]) / "adapter_config.json").read_text())
            if config.get("bias") == "all":
                self.say(400, {"error": {"message": "Adapter bias is not supported."}})
                return
            names.append(said["lora_name"])
            self.say(200, {})
            return
        text = f"{said['model']} says {said['messages'][-1]['content']}"
        choice = {"message": {"content": text}, "finish_reason": "stop"}
        self.say(200, {"choices": [choice], "usage": {"prompt_tokens": 3, "completion_tokens": 4}})

    def say(self, status: int, said: dict[str, Any]) -> None:
        content = json.dumps(said).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, format: str, *args: Any) -> None:
        pass


if CONTEXT == "0":
    sys.exit("ValueError: this model has no context")
print("loading weights", flush=True)
engine = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])  # as vLLM's engine core
print(f"engine {engine.pid}", flush=True)
ThreadingHTTPServer(("127.0.0.1", int(PORT)), Handler).serve_forever()
