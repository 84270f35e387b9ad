"""One SGLang server: its command line, process, log, and control requests.

Facts about SGLang 0.5.23 are from its server_args.py, http_server.py and weight_updater.py.
"""

from __future__ import annotations

import http.client
import json
import os
import secrets
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

from icrl_megatron.distributed import net
from icrl_megatron.engines.protocol import EngineError, NoAnswerError
from icrl_megatron.engines.sglang_start import KEY_ENV
from icrl_megatron.settings.schema import EngineSettings
from icrl_megatron.utils import parent_watch, processes
from icrl_megatron.utils.disk import disk_errors
from icrl_megatron.utils.errors import ConfigError

TESTED = ("0.5.23",)
"""Versions of SGLang that this revision was tested with."""
TAIL_LINES = 25
"""Lines of a server's log in an error message."""
_CPU_KV_TOKENS = 65536
CONTEXT_SPARE = 8
"""SGLang reserves a few tokens of --context-length and of its KV cache (tp_worker.py: the longest input is 6 less than
the smaller of the two; a longer one is refused, and a reply that would be longer is cut)."""
_PORT_TRIES = 3
_LOG_OF_A_START = 1 << 20
"""Bytes of the log that are searched while a server starts."""
_ANSWER_BYTES = 64 << 20
"""Maximum size of the answer to a control request; the longest one has a checksum of every tensor."""
_TORCHRUN = ("RANK", "WORLD_SIZE", "LOCAL_", "GROUP_", "ROLE_", "MASTER_", "TORCHELASTIC_", "TORCH_NCCL_ASYNC", "ICRL_")
"""Prefixes of a rank's environment variables that would make a server consider itself a rank."""

_STARTER = ThreadPoolExecutor(1, thread_name_prefix="server-starter")
"""Starts servers. A server ends with the thread that started it (`parent_watch`); this thread lasts as long as the
process, which one of `asyncio.to_thread` may not."""


@dataclass(frozen=True)
class ServerSpec:
    """The configuration that a server is started with."""

    model: Path
    settings: EngineSettings
    precision: str
    """bf16 | fp32: the dtype of its weights and activations."""
    context_tokens: int
    """Maximum length of prompt plus reply."""
    log: Path
    """File to which the server's output is appended."""
    on_cpu: bool
    first_gpu: int = 0
    keeps_weights: bool = False
    """No weights are sent: the server keeps those it started with in host memory while it sleeps."""
    on_engine_ranks: bool = False
    """Nothing else uses its GPUs (`launch.engine_ranks`): it never sleeps."""
    loader: str = ""
    """A function of a module in on_server/ that loads weights (--custom-weight-loader); empty: only SGLang's own."""

    @property
    def python(self) -> str:
        return self.settings.python or sys.executable

    def command(self, port: int) -> list[str]:
        settings = self.settings
        start = str(Path(__file__).with_name("sglang_start.py"))
        command = [self.python, start, "--model-path", str(self.model.resolve())]
        # SGLang needs the tokenizer for stop strings. Its warm-up sends English text, of which a small vocabulary may
        # leave no token, and SGLang then crashes.
        command += ["--host", "127.0.0.1", "--port", str(port), "--skip-server-warmup"]
        command += ["--dtype", {"bf16": "bfloat16", "fp32": "float32"}[self.precision]]
        command += ["--context-length", str(self.context_tokens + CONTEXT_SPARE)]
        command += ["--max-running-requests", str(settings.max_batch), "--tp-size", str(settings.tensor_parallel)]
        kv_tokens = settings.kv_tokens
        if self.on_cpu:
            kv_tokens = kv_tokens or _CPU_KV_TOKENS
            command += ["--device", "cpu", "--attention-backend", "torch_native", "--sampling-backend", "pytorch"]
            command += ["--grammar-backend", "none", "--disable-cuda-graph"]
            command += ["--sleep-on-idle"]  # otherwise its loop keeps a core busy while the actor trains
        else:
            command += ["--base-gpu-id", str(self.first_gpu)]
            command += [] if self.on_engine_ranks else ["--enable-memory-saver"]
            command += ["--mem-fraction-static", str(settings.memory_fraction)]
            command += ["--enable-weights-cpu-backup"] if self.keeps_weights else []
        if kv_tokens:
            command += ["--max-total-tokens", str(kv_tokens + CONTEXT_SPARE)]
        if settings.quantization:
            command += ["--quantization", settings.quantization]
            # This loader can quantize weights that are sent later. With the default loader SGLang forgets how to load a
            # parameter once it is quantized, and the first update crashes the server.
            command += ["--load-format", "flash_rl"]
        if self.loader:
            command += ["--custom-weight-loader", self.loader]
        return [*command, *settings.server_args]

    def environment(self, port: int, key: str, meeting: Path) -> dict[str, str]:
        """`meeting` is the path of a file, not yet created, through which the server's workers find each other: the
        default store listens on every interface."""
        env = {k: v for k, v in os.environ.items() if not k.startswith(_TORCHRUN)}
        if self.settings.python:
            env.pop("PYTHONPATH", None)  # the other interpreter has its own packages
        if self.loader:
            folder = str(Path(__file__).resolve().with_name("on_server"))
            env["PYTHONPATH"] = os.pathsep.join(filter(None, (folder, env.get("PYTHONPATH"))))
        if self.on_cpu:
            env["SGLANG_USE_CPU_ENGINE"] = "1"
        # The spare tokens may exceed the model's positions; no request is that long.
        env |= {"SGLANG_ALLOW_OVERWRITE_LONGER_CONTEXT_LEN": "1", KEY_ENV: key}
        env |= {"SGLANG_DISTRIBUTED_INIT_METHOD_OVERRIDE": f"file://{meeting}"}
        # SGLang names its shared memory after these two, which otherwise come from the store's address.
        env |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        # A server runs on one machine: its workers listen on loopback only.
        return env | dict.fromkeys(("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"), net.loopback_interface())


@dataclass
class Server:
    """A server at `url`. `spec` is None for an external server, which is never started or killed."""

    spec: ServerSpec | None
    url: str = ""
    key: str = field(default="", repr=False)
    """API key: generated at each start of the run's own servers; empty for an external server that needs none."""
    _folder: tempfile.TemporaryDirectory[str] | None = field(default=None, repr=False)
    """Holds the file through which the workers of the current start find each other."""
    _process: subprocess.Popen[bytes] | None = field(default=None, repr=False)
    _tries: int = 0
    _log_begin: int = 0
    """Size of the log in bytes before the current start."""

    def start(self) -> None:
        """Starts the process on a free port, without waiting for it. Raises EngineError if the model's folder is
        gone."""
        assert self.spec is not None
        if not self.spec.model.is_dir():
            raise EngineError(
                f"The model's folder {self.spec.model} is gone, and SGLang needs it to start a server: put a copy of "
                "the same model there, and run the same command again."
            )
        with disk_errors(self.spec.log, "the server's log"):
            self.spec.log.parent.mkdir(parents=True, exist_ok=True)
        port = net.free_port()
        self.key = secrets.token_urlsafe(32)
        self._folder = tempfile.TemporaryDirectory(prefix="icrl_sglang_")  # its mode is 0700
        self.url = f"http://127.0.0.1:{port}"
        watched = [self.spec.python, parent_watch.__file__, str(os.getpid())]
        with self.spec.log.open("ab") as log:
            self._log_begin = log.tell()
            log.write(f"\n=== {time.strftime('%Y-%m-%d %H:%M:%S')} port {port}\n".encode())
            log.flush()
            # A separate session, so that it can be killed as a group. Its working directory must not contain folders
            # that Python would import (a checkout of this project has one called kernels).
            self._process = _STARTER.submit(
                subprocess.Popen,
                [*watched, *self.spec.command(port)],
                env=self.spec.environment(port, self.key, Path(self._folder.name) / "meeting"),
                cwd=self.spec.log.parent,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            ).result()

    def wait_ready(self, tick: Callable[[], None] = lambda: None) -> None:
        """Returns when it answers. Raises EngineError with the end of the log if it dies or after
        `engine.startup_timeout_s`; ConfigError if its KV cache is too small."""
        assert self.spec is not None
        limit = self.spec.settings.startup_timeout_s
        deadline = time.monotonic() + limit
        while not self.answers():
            tick()
            if self._port_taken() and self._tries < _PORT_TRIES:
                self._tries += 1
                self.kill()
                self.start()
            elif not self.alive():
                code = self._process.returncode if self._process else None
                self.kill()
                raise EngineError(f"The SGLang server ended with code {code} before it was ready. {self.log_end()}")
            if time.monotonic() > deadline:
                self.kill()
                raise EngineError(
                    f"The SGLang server was not ready after engine.startup_timeout_s = {limit:g} s: raise it, or check "
                    f"the log. {self.log_end()}"
                )
            time.sleep(0.5)
        try:
            where = f"the SGLang server on {'this CPU' if self.spec.on_cpu else f'GPU {self.spec.first_gpu}'}"
            require_cache(self.info(), self.spec.context_tokens, where, "engine.kv_tokens or engine.memory_fraction")
        except (ConfigError, EngineError):
            self.kill()
            raise

    def _port_taken(self) -> bool:
        """Whether the log reports a used port. SGLang logs this but stays for two minutes, until its warm-up fails."""
        assert self.spec is not None
        with self.spec.log.open("rb") as log:
            log.seek(self._log_begin)
            return b"address already in use" in log.read(_LOG_OF_A_START).lower()

    def answers(self) -> bool:
        """Whether /health returns 200 now."""
        try:
            with self._open("/health", None, timeout=30.0) as reply:
                return bool(reply.status == 200)
        except (OSError, http.client.HTTPException, ValueError):
            return False

    def alive(self) -> bool:
        """Whether the process exists; for an external server, whether it answers."""
        if self.spec is None:
            return self.answers()
        return self._process is not None and self._process.poll() is None

    def pid(self) -> int | None:
        return self._process.pid if self._process is not None else None

    def memory_bytes(self) -> int:
        """Resident host memory of the server's processes; 0 for an external server."""
        try:
            found = processes.tree(self._process.pid) if self._process is not None else []
            return sum(p.memory_info().rss for p in found)
        except psutil.NoSuchProcess:
            return 0

    def kill(self) -> None:
        """Kills and reaps the process started here, including its workers."""
        if self._process is None:
            return
        processes.kill_tree(self._process)
        if self._folder is not None:
            self._folder.cleanup()

    def headers(self) -> dict[str, str]:
        """Headers that a request to this server needs."""
        return {"Authorization": f"Bearer {self.key}"} if self.key else {}

    def masked(self, text: str) -> str:
        """Masks the key, which a server may repeat in its answers."""
        return text.replace(self.key, "***") if self.key else text

    def quoted(self, text: bytes, limit: int = 300) -> str:
        """The beginning of the server's answer, for a message."""
        return repr(self.masked(text.decode(errors="replace"))[:limit])

    def _open(self, path: str, body: bytes | None, timeout: float) -> Any:
        headers = {"Content-Type": "application/json", **self.headers()}
        return _DIRECTLY.open(urllib.request.Request(f"{self.url}{path}", data=body, headers=headers), timeout=timeout)

    def post(self, path: str, body: dict[str, Any], timeout: float) -> dict[str, Any]:
        """POSTs JSON and returns the JSON answer; {} if SGLang's answer has no content.

        Raises NoAnswerError if no answer comes in time or it is not one that SGLang gives on success; EngineError if
        the server refuses.
        """
        try:
            with self._open(path, json.dumps(body).encode(), timeout) as reply:
                text = _body(reply, timeout)
        except urllib.error.HTTPError as error:
            kind = NoAnswerError if error.code >= 500 else EngineError
            said = "failed at" if error.code >= 500 else "refused"
            raise kind(f"SGLang {said} {path}: {error.code} {self.quoted(_rest(error))}. {self.log_end()}") from error
        except (OSError, http.client.HTTPException) as error:
            raise NoAnswerError(f"SGLang did not answer {path} ({error!r}). {self.log_end()}") from error
        answer = _said(path, text)
        if answer is None:
            raise NoAnswerError(
                f"SGLang answered {path} with {self.quoted(text)}, which SGLang never does. {self.log_end()}"
            )
        if answer.get("success") is False:
            raise EngineError(f"SGLang refused {path}: {self.masked(str(answer.get('message')))}. {self.log_end()}")
        return answer

    def info(self) -> dict[str, Any]:
        """Returns /server_info (settings and version). Raises EngineError."""
        try:
            with self._open("/server_info", None, timeout=60.0) as reply:
                found: dict[str, Any] = json.loads(_body(reply, 60.0))
                return found
        except urllib.error.HTTPError as error:
            if error.code in (401, 403):
                raise EngineError(
                    f"{self.url} refuses requests without its API key ({error.code}): put the key into an environment "
                    "variable, and that variable's name into engine.api_key_env"
                ) from error
            raise EngineError(f"{self.url}/server_info answers {error.code}: is this an SGLang server?") from error
        except (OSError, http.client.HTTPException, ValueError, RecursionError) as error:
            raise EngineError(f"{self.url}/server_info does not answer ({error}): is this an SGLang server?") from error

    def weight_version(self) -> str:
        """The version of the weights that the server reports. Raises NoAnswerError."""
        try:
            with self._open("/model_info", None, timeout=60.0) as reply:
                return str(json.loads(_body(reply, 60.0))["weight_version"])
        except (OSError, http.client.HTTPException, ValueError, RecursionError, LookupError, TypeError) as error:
            raise NoAnswerError(f"{self.url}/model_info does not answer ({error!r}). {self.log_end()}") from error

    def tail(self) -> str:
        if self.spec is None or not self.spec.log.exists():
            return ""
        with self.spec.log.open("rb") as log:
            log.seek(max(0, self.spec.log.stat().st_size - 65536))
            text = log.read().decode(errors="replace")
        return "\n".join(text.splitlines()[-TAIL_LINES:])

    def log_end(self) -> str:
        if self.spec is None:
            return f"(The server at {self.url} keeps its own log.)"
        return f"The end of {self.spec.log}:\n{self.tail()}"


def installed_version(python: str) -> str | None:
    """The SGLang version of an interpreter; None if it has none. Raises ConfigError if the interpreter cannot be
    run."""
    code = "import importlib.metadata as m\ntry: print(m.version('sglang'))\nexcept m.PackageNotFoundError: print()"
    try:
        done = subprocess.run([python or sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise ConfigError(
            f"engine.python={python}: cannot be run ({error}); give the path of an interpreter"
        ) from error
    return done.stdout.strip() or None


def check_version(found: str | None, settings: EngineSettings, where: str) -> None:
    """Raises ConfigError if SGLang is missing or its version is untested."""
    if found is None:
        raise ConfigError(
            f"engine.kind=sglang: {where} has no SGLang; pip install sglang=={TESTED[-1]} there, or set engine.python"
        )
    if found not in TESTED and not settings.allow_untested:
        raise ConfigError(
            f"{where} has SGLang {found}; this version was tested with {', '.join(TESTED)}: install that, or set "
            "engine.allow_untested=true"
        )


def require_cache(info: dict[str, Any], context_tokens: int, where: str, settings: str) -> None:
    """Raises ConfigError if a KV cache (per /server_info) holds less than one whole context: SGLang would silently cut
    replies at its end."""
    held, needed = info.get("max_total_num_tokens"), context_tokens + CONTEXT_SPARE
    if isinstance(held, int) and held < needed:
        raise ConfigError(
            f"The KV cache of {where} holds {held} tokens, and rollout.context_tokens={context_tokens} takes {needed}: "
            f"raise {settings}, or lower rollout.context_tokens"
        )


def _said(path: str, text: bytes) -> dict[str, Any] | None:
    """SGLang's answer on success or on an explained refusal; None for anything else."""
    plain = path.partition("?")[0]
    if plain == "/flush_cache":  # text
        return {} if text.startswith(b"Cache flushed") else None
    try:
        found = json.loads(text)
    except (ValueError, RecursionError):
        return None
    if plain in ("/release_memory_occupation", "/resume_memory_occupation"):
        return {} if found is None else None
    return found if isinstance(found, dict) and isinstance(found.get("success"), bool) else None


def _body(reply: Any, timeout: float) -> bytes:
    """Reads the whole answer. Raises OSError if it is longer than _ANSWER_BYTES, or if it keeps trickling in after
    `timeout` seconds."""
    deadline, found = time.monotonic() + timeout, bytearray()
    while chunk := reply.read1(1 << 16):
        found += chunk
        if len(found) > _ANSWER_BYTES:
            raise OSError(f"it answered more than {_ANSWER_BYTES} bytes")
        if time.monotonic() > deadline:
            raise TimeoutError(f"its answer did not end within {timeout:g} s")
    return bytes(found)


def _rest(error: urllib.error.HTTPError) -> bytes:
    try:
        return error.read(65536)
    except (OSError, http.client.HTTPException):  # the connection broke in the middle
        return b""


_DIRECTLY = urllib.request.build_opener(urllib.request.ProxyHandler({}))
"""Ignores proxies of the environment."""
