"""Serve a page to try a model: one translation at a time, with requests bounded in size and rate."""

from __future__ import annotations

import contextlib
import json
import logging
import math
import secrets
import socket
import threading
import time
from collections import deque
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import jinja2

from eval.page import TEMPLATES
from eval.routing import forward_passes, translation
from eval.routing.layers import moe_layers
from eval.text.translator import Translator
from xmoe_fairseq.moe import record_plans

_LOOPBACK = ("127.0.0.1", "localhost", "::1")
MAX_CHARACTERS = 1000
MAX_BODY = 8 * MAX_CHARACTERS  # bytes; JSON may write a character as \uXXXX
MAX_CAPACITY = 8.0
MAX_CONNECTIONS = 16
WAIT_SECONDS = 20.0  # to wait for the translation before this one


class RequestError(Exception):
    """A request that the server refuses, because it is wrong or because the server cannot serve it now."""

    def __init__(self, status: HTTPStatus, message: str) -> None:
        super().__init__(message)
        self.status = status


class RateLimit:
    """Allows at most ``count`` events in any ``seconds``."""

    def __init__(self, count: int, seconds: float = 60.0) -> None:
        self.count, self.seconds = count, seconds
        self._times: deque[float] = deque()
        self._lock = threading.Lock()

    def allow(self) -> bool:
        now = time.monotonic()
        with self._lock:
            while self._times and now - self._times[0] > self.seconds:
                self._times.popleft()
            if len(self._times) >= self.count:
                return False
            self._times.append(now)
            return True


class Page:
    """The page and its model, which does one translation at a time."""

    def __init__(self, translator: Translator, *, requests_per_minute: int = 60) -> None:
        self.translator = translator
        model = translator.models[0]
        self.loaded = translator.loaded
        self.configs = [layer.config for layer in moe_layers(model).values()]
        self.rate = RateLimit(requests_per_minute)
        self._busy = threading.Lock()

    @property
    def has_threshold(self) -> bool:
        return bool(self.configs) and all(config.router == "threshold" for config in self.configs)

    @property
    def has_capacity(self) -> bool:
        return bool(self.configs) and not any(config.merge_experts for config in self.configs)

    def html(self, nonce: str) -> str:
        """The page's HTML; ``nonce`` marks its own scripts."""
        config = self.translator.config
        first = self.configs[0] if self.configs else None
        description = "A dense model: no token chooses an expert."
        if first:
            experts = f"{first.num_experts} experts of {first.expert_dim}"
            description = f"{len(self.configs)} MoE layers, router {first.router}, {experts} hidden units."
        environment = jinja2.Environment(loader=jinja2.FileSystemLoader(TEMPLATES), autoescape=True)
        return environment.get_template("serve.html.j2").render(
            title=f"{config.source_lang}-{config.target_lang}: try the model",
            description=description,
            source_language=config.source_lang,
            target_language=config.target_lang,
            max_characters=MAX_CHARACTERS,
            threshold=first.threshold if self.has_threshold else None,
            has_capacity=self.has_capacity,
            most_capacity=4.25,  # one step above 4 means no limit
            capacity=first and first.eval_capacity_factor,
            nonce=nonce,
            **{
                name.replace(".", "_"): (TEMPLATES / name).read_text(encoding="utf-8")
                for name in ("theme.js", "explorer.js", "serve.js")
            },
            css=(TEMPLATES / "style.css").read_text(encoding="utf-8"),
        )

    def answer(self, body: bytes) -> dict[str, Any]:
        """Translate what a request asks for. Raises: RequestError."""
        text, settings = self.read_request(body)
        if not self.rate.allow():
            raise RequestError(
                HTTPStatus.TOO_MANY_REQUESTS, f"more than {self.rate.count} requests a minute; wait a little"
            )
        if not self._busy.acquire(timeout=WAIT_SECONDS):
            raise RequestError(HTTPStatus.SERVICE_UNAVAILABLE, "the model is busy with other sentences; try again")
        try:
            with forward_passes.routing_settings(self.loaded.model, **settings):
                return self._translate(text, settings)
        except ValueError as error:  # a sentence with more subwords than the model has positions for
            raise RequestError(HTTPStatus.BAD_REQUEST, str(error)) from None
        finally:
            self._busy.release()

    def read_request(self, body: bytes) -> tuple[str, dict[str, Any]]:
        """The sentence and the routing settings of a request body. Raises: RequestError, saying what is allowed."""
        try:
            request = json.loads(body)
        except (ValueError, RecursionError):
            raise RequestError(HTTPStatus.BAD_REQUEST, "the request is not JSON") from None
        if not isinstance(request, dict) or not isinstance(request.get("text"), str):
            raise RequestError(HTTPStatus.BAD_REQUEST, "the request wants a text: a sentence to translate")
        text = " ".join(request["text"].replace("\0", " ").split())
        if not text or len(text) > MAX_CHARACTERS:
            raise RequestError(
                HTTPStatus.BAD_REQUEST,
                f"type a sentence of 1 to {MAX_CHARACTERS} characters; this one has {len(text)}",
            )
        if not text.isascii() and any(0xD800 <= ord(character) <= 0xDFFF for character in text):
            raise RequestError(
                HTTPStatus.BAD_REQUEST, "the sentence holds half a surrogate pair, which is no character"
            )
        settings: dict[str, Any] = {}
        if self.has_threshold and request.get("threshold") is not None:
            settings["threshold"] = _number("threshold", request["threshold"], 0.0, 1.0)
        if self.has_capacity:
            capacity = request.get("capacity")
            limit = None if capacity is None else _number("capacity", capacity, 0.01, MAX_CAPACITY)
            settings["eval_capacity_factor"] = limit
        return text, settings

    def _translate(self, text: str, settings: dict[str, Any]) -> dict[str, Any]:
        start = time.perf_counter()
        with record_plans(self.loaded.model) as plans:
            found = self.translator.translate([text])[0]
        seconds = time.perf_counter() - start
        sums: dict[str, dict[str, float]] = {}
        forward_passes.add_plans(sums, plans)
        figures = forward_passes.summed_figures(sums)
        rows = {name: sum(int(plan.count_E.sum()) for plan in of_layer) for name, of_layer in plans.items()}
        layers = moe_layers(self.loaded.model)
        source, target = " ".join(self.translator.encode(text)), " ".join(found.tokens)
        routed = translation.routing_of(self.loaded, [source], [target])[0]
        return {
            "translation": found.text,
            "score": found.score,
            "milliseconds": 1000 * seconds,
            "threshold": settings.get("threshold"),
            "capacity": settings.get("eval_capacity_factor"),
            "moe_flops": sum(count * layers[name].config.flops_per_row for name, count in rows.items()),
            **{name: figures[name] for name in ("flops", "used", "wanted", "dropped")},
            "sentence": {"id": 0, **routed},
        }


def _number(name: str, value: Any, least: float, most: float) -> float:
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not (is_number and math.isfinite(value) and least <= value <= most):
        raise RequestError(HTTPStatus.BAD_REQUEST, f"{name} must be a number from {least:g} to {most:g}")
    return float(value)


class Handler(BaseHTTPRequestHandler):
    """Answers GET / with the page and POST /translate with JSON; refuses everything else."""

    server: Server
    timeout = 15  # seconds a client may keep silent
    server_version = "xmoe"
    sys_version = ""

    def do_GET(self) -> None:
        nonce = secrets.token_urlsafe(16)
        self._guarded(lambda: ("text/html; charset=utf-8", self._page(nonce)), nonce)

    def do_POST(self) -> None:
        self._guarded(lambda: ("application/json", self._json(self.server.page.answer(self._body()))))

    def _page(self, nonce: str) -> bytes:
        if self.path.split("?")[0] != "/":
            raise RequestError(HTTPStatus.NOT_FOUND, "there is only one page: /")
        return self.server.page.html(nonce).encode()

    def _body(self) -> bytes:
        if self.path != "/translate":
            raise RequestError(HTTPStatus.NOT_FOUND, "POST goes to /translate")
        # a page of another site cannot send this type without a CORS request, which this server does not grant
        if self.headers.get_content_type() != "application/json":
            raise RequestError(HTTPStatus.UNSUPPORTED_MEDIA_TYPE, "send application/json")
        length = self.headers.get("Content-Length", "")
        if not (length.isascii() and length.isdigit()):
            raise RequestError(HTTPStatus.LENGTH_REQUIRED, "the request has no Content-Length")
        if len(length) > 9 or int(length) > MAX_BODY:
            raise RequestError(HTTPStatus.REQUEST_ENTITY_TOO_LARGE, f"at most {MAX_BODY} bytes")
        return self.rfile.read(int(length))

    def _guarded(self, work: Any, nonce: str = "") -> None:
        try:
            self._check_host()
            kind, content = work()
            status = HTTPStatus.OK
        except RequestError as error:
            status, kind, content = error.status, "application/json", self._json({"error": str(error)})
        except (ConnectionError, TimeoutError):
            return
        except Exception:
            logging.getLogger("eval.serve").exception("a request failed")
            status, kind = HTTPStatus.INTERNAL_SERVER_ERROR, "application/json"
            content = self._json({"error": "the server failed at this request; its terminal says why"})
        with contextlib.suppress(ConnectionError, TimeoutError):
            self._send(status, kind, content, nonce)

    def _check_host(self) -> None:
        """Refuse other host names, under which a page of another site could reach this server (DNS rebinding)."""
        host = self.headers.get("Host", "").rsplit(":", 1)[0].strip("[]")
        if self.server.is_local and host not in _LOOPBACK:
            raise RequestError(HTTPStatus.FORBIDDEN, "open this page as http://127.0.0.1 or http://localhost")

    @staticmethod
    def _json(content: dict[str, Any]) -> bytes:
        return json.dumps(content, ensure_ascii=False).encode("utf-8", errors="replace")

    def _send(self, status: HTTPStatus, kind: str, content: bytes, nonce: str) -> None:
        self.send_response(status)
        policy = f"default-src 'none'; script-src 'nonce-{nonce}'; style-src 'unsafe-inline'; img-src data:"
        for name, value in {
            "Content-Type": kind,
            "Content-Length": str(len(content)),
            "Content-Security-Policy": policy
            + "; connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
            "X-Content-Type-Options": "nosniff",
            "Referrer-Policy": "no-referrer",
            "Cache-Control": "no-store",
            "Connection": "close",
        }.items():
            self.send_header(name, value)
        if status == HTTPStatus.TOO_MANY_REQUESTS:
            self.send_header("Retry-After", "10")
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, template: str, *values: Any) -> None:
        """Log nothing, so that no text of a request is kept; ``log_request`` logs the status."""


class Server(ThreadingHTTPServer):
    """Serves one Page and closes connections beyond ``MAX_CONNECTIONS`` at once."""

    daemon_threads = True

    def __init__(self, address: tuple[str, int], page: Page) -> None:
        self.page = page
        self.is_local = address[0] in _LOOPBACK
        if ":" in address[0]:
            self.address_family = socket.AF_INET6
        self._slots = threading.BoundedSemaphore(MAX_CONNECTIONS)
        super().__init__(address, Handler)

    def process_request(self, request: Any, client_address: Any) -> None:
        if not self._slots.acquire(blocking=False):
            self.shutdown_request(request)
            return
        super().process_request(request, client_address)

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        try:
            super().process_request_thread(request, client_address)
        finally:
            self._slots.release()
