"""llama.cpp in a process of its own, for it ends the one that it is in on a fault."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import urllib.request
from pathlib import Path
from typing import Any

_MARK = "answer "  # which tells answers from llama.cpp's own words


class LlamaCpp:
    """A file, loaded."""

    def __init__(self, file: Path) -> None:
        command = [sys.executable, "-c", f"import {__name__} as m; m.serve()", str(file)]
        pipe = subprocess.PIPE
        self.words = tempfile.TemporaryFile("w+")  # noqa: SIM115 # closed on leaving
        self.process = subprocess.Popen(
            command, stdin=pipe, stdout=pipe, stderr=self.words, text=True
        )

    def ask(self, prompt: str | list[int]) -> Any:
        """Raises RuntimeError with llama.cpp's words where it refuses the file."""
        answer, process = "", self.process
        try:
            print(json.dumps(prompt), file=process.stdin, flush=True)
            answer = next((line for line in process.stdout if line.startswith(_MARK)), "")
        except BrokenPipeError:
            pass
        if not answer:
            process.wait()
            self.words.seek(0)
            raise RuntimeError(self.words.read()[-3000:])
        return json.loads(answer.removeprefix(_MARK))

    def tokens(self, text: str) -> list[int]:
        """Of a text, those before it that mark its beginning too."""
        return list(map(int, self.ask(text)))

    def next(self, prompt: list[int]) -> dict[int, float]:
        """The five likeliest tokens, best first: the logarithms of their probabilities."""
        return {int(token): float(log) for token, log in self.ask(prompt)}

    def greedy(self, prompt: list[int], count: int) -> list[int]:
        tokens = list(prompt)
        for _ in range(count):
            tokens.append(next(iter(self.next(tokens))))
        return tokens[len(prompt) :]

    def __enter__(self) -> LlamaCpp:
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.communicate()
        self.words.close()


def serve() -> None:
    """Loads the file of the command line, and answers each line of its input: a list of tokens in
    JSON with the likeliest next ones, a text with its tokens."""
    import xllamacpp

    params, file = xllamacpp.CommonParams(), sys.argv[1]
    params.model.path, params.n_ctx, params.n_parallel = file, 128, 1
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = 1
    params.warmup = params.fit_params = False
    server = xllamacpp.Server(params)
    for line in sys.stdin:
        asked = json.loads(line)
        if isinstance(asked, str):
            body = json.dumps({"content": asked, "add_special": True}).encode()
            about = {"Content-Type": "application/json"}
            request = urllib.request.Request(server.listening_address + "/tokenize", body, about)
            direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))
            with direct.open(request) as reply:
                answer = json.load(reply)["tokens"]
        else:
            wish = {"max_tokens": 1, "temperature": 0, "logprobs": 5}
            more = {"cache_prompt": False, "ignore_eos": True}
            found = server.handle_completions({"prompt": asked, **wish, **more})
            (token,) = found["choices"][0]["logprobs"]["content"]
            answer = [(one["id"], one["logprob"]) for one in (token, *token["top_logprobs"])]
        print(_MARK + json.dumps(answer), flush=True)
