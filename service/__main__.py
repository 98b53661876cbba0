"""`python -m service`: start the service. `detect PICTURE...`: the same on files. `key NAME`: make an API key."""

from __future__ import annotations

import argparse
import asyncio
import sys
from collections.abc import Sequence

from service import __version__, command, logs
from service.app import create_app, create_operations_app
from service.auth import KeyFileError, make_key
from service.errors import DetectorError
from service.health import EXIT_NO_MODEL
from service.loading import NoModel, require_models
from service.runtime import ProviderMissing, provider_candidates
from service.server import PortTaken, make_server, serve
from service.settings import Settings, SettingsError, describe_settings, load_settings

EXIT_USAGE = 2


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns the exit code: 0 after an orderly end, 2 for settings, 3 no model, 4 device lost, 5 device hung."""
    parser = _make_parser()
    given = parser.parse_args(arguments)
    if given.command == "key":
        return _print_key(given.name)
    overrides = {name: value for name in ("host", "port", "model_repository", "provider") if (value := getattr(given, name)) is not None}
    try:
        settings = load_settings(**overrides)
        provider_candidates(settings.provider)
        require_models(settings.model_repository, settings.model)
        if given.command == "detect":
            logs.configure_logs("warning", "text")
            return command.detect(given, create_app(settings))
        return run(settings)
    except NoModel as error:
        return _complain(error, EXIT_NO_MODEL)
    except (SettingsError, KeyFileError, ProviderMissing, PortTaken, DetectorError, ValueError) as error:
        return _complain(error, EXIT_USAGE)


def run(settings: Settings) -> int:
    """Serve until told to stop. Returns the exit code."""
    logs.configure_logs(settings.log_level, settings.log_format)
    app = create_app(settings)
    operations = create_operations_app(app.state.parts) if settings.operations_port is not None else None
    server = make_server(app, settings, operations=operations)
    with asyncio.Runner(loop_factory=server.config.get_loop_factory()) as runner:
        runner.run(serve(server))
    return server.exit_code


def _make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m service",
        description="Serve object detection over HTTP.",
        epilog=f"settings, from the environment [default]:\n{describe_settings()}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=__version__)
    parser.add_argument("--host", help="instead of DETECTOR_HOST")
    parser.add_argument("--port", type=int, help="instead of DETECTOR_PORT")
    parser.add_argument("--model-repository", help="instead of DETECTOR_MODEL_REPOSITORY")
    parser.add_argument("--provider", help="instead of DETECTOR_PROVIDER: auto, cuda, tensorrt or cpu")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND")
    detect = commands.add_parser("detect", help="detect on files, without a server")
    command.add_arguments(detect)
    key = commands.add_parser("key", help="make an API key: prints the key, and the line for the key file")
    key.add_argument("name", help="who will hold it")
    return parser


def _print_key(name: str) -> int:
    key, line = make_key(name)
    print(f"key, give it to {name} and keep no copy: {key}")
    print(f"line for DETECTOR_API_KEYS_FILE or DETECTOR_ADMIN_KEYS_FILE: {line}")
    return 0


def _complain(error: Exception, code: int) -> int:
    print(f"python -m service: {error}", file=sys.stderr)
    return code


if __name__ == "__main__":
    sys.exit(main())
