from __future__ import annotations

import asyncio

import pytest
from service_fakes import fake_service, picture, run

from service.auth import KeyFileError, KeyRing, hash_key, make_key, read_keys
from service.errors import BodyTooLarge, SlowBody
from service.middleware import BodyLimitMiddleware, make_request_id

PNG = {"content-type": "image/png"}


def read_through(messages, *, max_bytes=100, timeout_s=0.05, headers=()):
    """What an app behind the middleware reads: the body, or the error that its `receive` raised."""
    read = []

    async def app(scope, receive, send):
        while True:
            message = await receive()
            read.append(message)
            if not message.get("more_body", False):
                return

    pending = iter(messages)

    async def receive():
        delay, message = next(pending)
        await asyncio.sleep(delay)
        return message

    async def scenario():
        middleware = BodyLimitMiddleware(app, max_bytes=max_bytes, timeout_s=timeout_s)
        await middleware({"type": "http", "headers": list(headers)}, receive, None)
        return b"".join(message["body"] for message in read)

    return run(scenario())


def chunk(size, *, more=True):
    return {"type": "http.request", "body": b"x" * size, "more_body": more}


def test_a_body_within_its_bounds_passes_unchanged():
    assert read_through([(0, chunk(60)), (0, chunk(40, more=False))]) == b"x" * 100


def test_a_claim_too_large_is_refused_before_anything_is_read():
    with pytest.raises(BodyTooLarge, match="has 101"):
        read_through([], headers=[(b"content-length", b"101")])


def test_a_claim_that_lies_is_found_out():
    with pytest.raises(BodyTooLarge):
        read_through([(0, chunk(60)), (0, chunk(60))], headers=[(b"content-length", b"10")])


@pytest.mark.parametrize("claim", [b"-5", b"abc", b"", b"\xb2"])
def test_a_claim_that_is_no_number_is_not_believed(claim):
    assert read_through([(0, chunk(5, more=False))], headers=[(b"content-length", claim)]) == b"x" * 5


def test_the_time_bounds_the_whole_body_and_not_each_piece():
    with pytest.raises(SlowBody, match="bytes came in"):
        read_through([(0.02, chunk(1))] * 50, timeout_s=0.1)


def test_after_the_body_a_client_may_wait_for_ever():
    waited = []

    async def app(scope, receive, send):
        await receive()
        watcher = asyncio.ensure_future(receive())
        await asyncio.sleep(0.1)
        waited.append(watcher.done())
        watcher.cancel()

    told = False

    async def receive():
        nonlocal told
        if told:
            await asyncio.Event().wait()
        told = True
        return chunk(1, more=False)

    run(BodyLimitMiddleware(app, max_bytes=10, timeout_s=0.01)({"type": "http", "headers": []}, receive, None))
    assert waited == [False]


def test_request_ids_do_not_repeat():
    assert len({make_request_id() for _ in range(10_000)}) == 10_000


def test_the_context_of_a_request_reaches_the_worker_threads(caplog):
    async def scenario():
        async with fake_service(access_log=True) as (client, _, _):
            caplog.set_level("INFO", "service")
            await client.post("/v1/detect", content=picture(), headers=PNG)
            records = [record for record in caplog.records if record.getMessage() == "request"]
            fields = records[0].fields
            assert (fields["route"], fields["status"], fields["model"]) == ("/v1/detect", 200, "blobs@1")
            assert fields["image"] == {"width": 90, "height": 60}

    run(scenario())


# Keys


def test_a_key_file_holds_no_key(tmp_path):
    key, line = make_key("alice")
    path = tmp_path / "keys"
    path.write_text(f"# comment\n\n{line}\n")
    assert key not in path.read_text()
    assert read_keys(path).holder(key) == "alice"
    assert read_keys(path).holder(key + "x") is None
    assert len(key) > 40


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "holds no key"),
        ("det_my-secret-key\n", "line 1: expected name:sha256"),
        ("alice:123\n", "line 1"),
        (f"a:{hash_key('x')}\na:{hash_key('y')}\n", "comes twice"),
    ],
)
def test_a_bad_key_file_names_the_line_and_shows_nothing_of_it(tmp_path, text, words):
    path = tmp_path / "keys"
    path.write_text(text)
    with pytest.raises(KeyFileError, match=words) as caught:
        read_keys(path)
    assert "secret" not in str(caught.value)


def test_every_digest_is_compared_whatever_the_key(monkeypatch):
    compared = []
    monkeypatch.setattr("service.auth.hmac.compare_digest", lambda one, other: compared.append(other) or one == other)
    ring = KeyRing({name: hash_key(name) for name in "abc"})
    assert ring.holder("a") == "a"
    assert ring.holder("zzz") is None
    assert len(compared) == 6


def test_keys_of_any_bytes_are_only_wrong():
    assert KeyRing({"a": hash_key("a")}).holder("\udcff\x00é") is None
