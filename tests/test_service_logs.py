from __future__ import annotations

import json
import logging

import pytest

from service import logs


def make_record(message="hello", **extra):
    record = logging.LogRecord("service.test", logging.INFO, "file.py", 1, message, (), None)
    record.__dict__.update(extra)
    return record


def test_json_holds_the_message_the_fields_and_the_request():
    token = logs.request_id.set("abc")
    try:
        entry = json.loads(logs.JsonFormatter().format(make_record("two\nlines", fields={"model": "cells@1", "path": object})))
    finally:
        logs.request_id.reset(token)
    assert (entry["message"], entry["model"], entry["request_id"], entry["level"]) == ("two\nlines", "cells@1", "abc", "info")
    assert entry["time"].endswith("+00:00")


def test_one_record_is_one_line_even_with_a_stack():
    try:
        raise ValueError("broken\nin two")
    except ValueError as error:
        record = make_record()
        record.exc_info = (type(error), error, error.__traceback__)
    text = logs.JsonFormatter().format(record)
    assert "\n" not in text
    assert "ValueError: broken" in json.loads(text)["error"]


def test_text_for_people():
    assert logs.TextFormatter().format(make_record(fields={"seconds": 2})).endswith("INFO    hello seconds=2")


def test_unknown_levels_are_refused():
    with pytest.raises(ValueError, match="not one of debug, info, warning, error"):
        logs.set_level("verbose")
