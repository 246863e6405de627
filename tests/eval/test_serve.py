"""eval.serve: a translation over HTTP, and an answer without a stack trace to everything else."""

import http.client
import json
import socket
import threading

import pytest

from eval import serve
from eval.page.server import MAX_BODY, RateLimit


@pytest.fixture(scope="module")
def server(tiny_model):
    arguments = ["--checkpoint", tiny_model.checkpoint, "--data", tiny_model.data, "--subwords", tiny_model.subwords]
    args = serve._parser().parse_args([*map(str, arguments), "--device", "cpu", "--beam", "2"])
    running = serve.Server(("127.0.0.1", 0), serve.build_page(args))
    thread = threading.Thread(target=running.serve_forever, daemon=True)
    thread.start()
    yield running
    running.shutdown()
    running.server_close()


def ask(server, body=None, *, method="POST", path="/translate", **headers):
    connection = http.client.HTTPConnection(*server.server_address, timeout=60)
    sent = {"Content-Type": "application/json"} if body is not None else {}
    content = body if isinstance(body, (bytes, type(None))) else json.dumps(body).encode()
    connection.request(method, path, content, {**sent, **headers})
    response = connection.getresponse()
    text = response.read().decode()
    assert "Traceback" not in text
    return response, text


def test_a_sentence_is_translated_with_its_routing_and_cost(server, tiny_model):
    text = tiny_model.source[0]
    response, answer = ask(server, {"text": text, "threshold": 0.9, "capacity": None})
    answer = json.loads(answer)
    page = server.page
    assert response.status == 200
    assert answer["translation"] == page.translator.translate([text])[0].text != ""
    assert answer["sentence"]["source"] == [*page.translator.encode(text), "</s>"]
    rows = answer["sentence"]["routing"]["encoder 0"]
    assert all(row[0] >= 1 and sum(row[2::2]) >= 0.9 - 1e-3 for row in rows)
    assert answer["flops"] == pytest.approx(answer["used"] * 16 / 32)
    assert answer["moe_flops"] > 0
    assert answer["milliseconds"] > 0


def test_it_listens_on_the_loopback_address_of_ipv6_too(server):
    try:
        socket.create_server(("::1", 0), family=socket.AF_INET6).close()
    except OSError as error:
        pytest.skip(f"no IPv6 here: {error}")
    with serve.Server(("::1", 0), server.page) as other:
        threading.Thread(target=other.handle_request, daemon=True).start()
        connection = http.client.HTTPConnection(*other.server_address[:2], timeout=60)
        connection.request("GET", "/")
        assert connection.getresponse().status == 200


def test_the_sliders_change_the_routing_of_this_request_only(server, tiny_model):
    text = " ".join(tiny_model.source[:2])
    one = json.loads(ask(server, {"text": text, "threshold": 0})[1])
    assert one["used"] == 1
    every = json.loads(ask(server, {"text": text, "threshold": 1})[1])
    assert every["used"] == 4
    limited = json.loads(ask(server, {"text": text, "threshold": 1, "capacity": 0.25})[1])
    assert limited["dropped"] > 0
    assert {config.threshold for config in server.page.configs} == {0.9}
    assert json.loads(ask(server, {"text": text})[1])["dropped"] == 0


@pytest.mark.parametrize(
    ("body", "status", "message"),
    [
        (b"x", 400, "not JSON"),
        (b"[" * 5000, 400, "not JSON"),
        ([1], 400, "wants a text"),
        ({"text": 5}, 400, "wants a text"),
        ({"text": " \n"}, 400, "1 to 1000 characters"),
        ({"text": "a" * 1001}, 400, "1 to 1000 characters"),
        ({"text": "один " * 150}, 400, "subwords"),
        ({"text": "a\ud800"}, 400, "surrogate"),
        ({"text": "a", "threshold": 1.5}, 400, "threshold must be a number from 0 to 1"),
        ({"text": "a", "threshold": "x"}, 400, "threshold must be a number"),
        (b'{"text": "a", "threshold": NaN}', 400, "threshold must be a number"),
        ({"text": "a", "capacity": 0}, 400, "capacity must be a number"),
        (b" " * (MAX_BODY + 1), 413, "bytes"),
    ],
)
def test_bad_requests_are_answered(server, body, status, message):
    response, text = ask(server, body)
    assert response.status == status
    assert message in json.loads(text)["error"]


def test_strangers_are_refused(server):
    assert ask(server, method="GET", path="/", Host="evil.example")[0].status == 403
    assert ask(server, {"text": "a"}, Host="evil.example:80")[0].status == 403
    assert ask(server, method="GET", path="/etc/passwd")[0].status == 404
    assert ask(server, {"text": "a"}, path="/other")[0].status == 404
    assert ask(server, b'{"text": "a"}', **{"Content-Type": "text/plain"})[0].status == 415
    assert ask(server, method="PUT", path="/")[0].status == 501
    page = ask(server, method="GET", path="/")
    assert page[0].status == 200
    assert "default-src 'none'" in page[0].getheader("Content-Security-Policy")


def test_requests_beyond_the_rate_wait(server, monkeypatch):
    monkeypatch.setattr(server.page, "rate", RateLimit(1))
    assert ask(server, {"text": "один"})[0].status == 200
    response, text = ask(server, {"text": "один"})
    assert response.status == 429
    assert response.getheader("Retry-After")
    assert "1 requests a minute" in json.loads(text)["error"]


def test_a_failure_inside_is_answered_without_its_details(server, monkeypatch):
    monkeypatch.setattr(server.page, "_translate", lambda *_: 1 / 0)
    response, text = ask(server, {"text": "один"})
    assert response.status == 500
    assert "division" not in text


def test_an_address_that_is_taken_is_named(server, tiny_model, capsys):
    port = server.server_address[1]
    places = ["--data", str(tiny_model.data), "--subwords", str(tiny_model.subwords), "--port", str(port)]
    assert serve.main(["--checkpoint", str(tiny_model.checkpoint), *places]) == 1
    assert f"cannot listen on 127.0.0.1:{port}: Address already in use; choose another" in capsys.readouterr().err


def test_what_is_missing_is_named(tiny_model, tmp_path, capsys):
    assert serve.main(["--checkpoint", str(tmp_path / "no.pt")]) == 1
    assert "no such file" in capsys.readouterr().err
    assert serve.main(["--checkpoint", str(tiny_model.checkpoint), "--data", str(tmp_path / "x")]) == 1
    assert "--data" in capsys.readouterr().err
    places = ["--data", str(tiny_model.data), "--subwords", str(tiny_model.subwords), "--source-lang", "xx"]
    assert serve.main(["--checkpoint", str(tiny_model.checkpoint), *places]) == 1
    assert "language 'xx'" in capsys.readouterr().err
