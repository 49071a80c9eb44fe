"""`posecrafter-rt serve`: an engine as a live avatar, until Ctrl-C.

Layer 8: arguments, one server, the line that says where it is.
"""

from __future__ import annotations

import gc
import json
import signal
import socket
import threading
import webbrowser
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated
from urllib.parse import urlencode

import typer

from posecrafter_rt.cli.main import heed_quota
from posecrafter_rt.errors import BackendUnavailable, PoseError

if TYPE_CHECKING:
    from fastapi import FastAPI

    from posecrafter_rt.poses.keypoints import PoseSequence

app = typer.Typer()


@app.command()
def serve(  # noqa: PLR0913 - one argument for each option
    engine: Annotated[Path, typer.Argument(help="What `posecrafter-rt build-engine` made.", show_default=False)],
    host: Annotated[
        str, typer.Option(help="Address to listen on; any but this machine's own needs --token.")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Port to listen on; 0: any free one.", min=0, max=65535)] = 8000,
    preset: Annotated[
        str,
        typer.Option(help="fast, balanced or quality; options given beside it take precedence."),
    ] = "balanced",
    steps: Annotated[
        int | None, typer.Option(help="Denoising steps a frame; else the preset's (balanced: 2).", min=1)
    ] = None,
    window: Annotated[int | None, typer.Option(help="Past frames that a frame attends to; else 2.", min=0)] = None,
    pipelined: Annotated[
        bool,
        typer.Option(
            "--pipelined",
            help="Denoise the last poses in one batch: more frames a second on a GPU, each some frames later.",
        ),
    ] = False,
    unet_every: Annotated[
        int | None,
        typer.Option(
            help="Run the whole networks every so many steps of a frame; 2 saves up to half of their time.", min=1
        ),
    ] = None,
    decoder: Annotated[
        str | None, typer.Option(help="full or small; else the preset's, or small where the engine has one.")
    ] = None,
    calibration: Annotated[
        Path | None,
        typer.Option(help="Poses like those to come; the reference is chosen by them (1 dB on the demonstration)."),
    ] = None,
    max_sessions: Annotated[int, typer.Option(help="Most clients at a time, up to 64; others are refused.")] = 4,
    token: Annotated[
        str | None,
        typer.Option(help="Secret that clients must send; safer in the environment variable POSECRAFTER_TOKEN."),
    ] = None,
    allow_origin: Annotated[
        list[str] | None,
        typer.Option(help="Origin of another page that may connect, such as https://example.org; repeatable."),
    ] = None,
    virtual_camera: Annotated[
        bool, typer.Option("--virtual-camera", help="Show the first client's avatar as a camera device.")
    ] = False,
    open_page: Annotated[bool, typer.Option("--open", help="Open the page in the browser.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the address as one line of JSON.")] = False,
) -> None:
    """Serve an engine as a live avatar."""
    from posecrafter_rt.config import serve_token
    from posecrafter_rt.serve.listening import listen
    from posecrafter_rt.serve.options import ServeOptions, is_loopback

    given = {"preset": preset, "steps": steps, "window": window, "is_pipelined": pipelined or None,
             "unet_every": unet_every, "decoder": decoder,
             "calibration": None if calibration is None else _read_calibration(calibration)}  # fmt: skip
    options = ServeOptions(
        stream={name: value for name, value in given.items() if value is not None},
        max_sessions=max_sessions, token=serve_token() if token is None else token, allow_origins=tuple(allow_origin or ()),
        is_loopback=is_loopback(host), has_virtual_camera=virtual_camera,
    )  # fmt: skip
    make_app = _app_maker()
    with listen(host, port) as listener:
        from posecrafter_rt.avatar import Avatar

        heed_quota()

        with Avatar.load(engine) as avatar:
            application = make_app(avatar, options)
            url = _url(host, listener.getsockname()[1], options.token)

            def on_ready() -> None:
                if as_json:
                    print(json.dumps({"url": url, **application.state.service.info()}), flush=True)
                else:
                    print(f"serving {engine} at {url} (Ctrl-C ends it)", flush=True)
                if open_page:  # in a thread, for some browsers keep it until they end, and this one has to serve them
                    threading.Thread(target=webbrowser.open, args=(url,), daemon=True).start()

            _run(application, listener, on_ready)


def _read_calibration(path: Path) -> PoseSequence:
    """Return the poses of the frames that show the person: the others say nothing about the poses to come.

    Raises: PoseError if none does, so that Eq. 5 could compare it.
    """
    import numpy as np

    from posecrafter_rt.poses.keypoints import CONFIDENCE_THRESHOLD
    from posecrafter_rt.poses.openpose_json import read_openpose

    poses = read_openpose(path, allow_missing=True)
    shown = (poses.keypoints[..., 2] >= CONFIDENCE_THRESHOLD).any(axis=1)
    if not shown.any():
        raise PoseError(f"{path}: no frame has a keypoint of confidence {CONFIDENCE_THRESHOLD} or more",
                        "extract the poses again, or check the confidences in the file")  # fmt: skip
    return poses[np.flatnonzero(shown)]


def _app_maker() -> Callable[..., FastAPI]:
    try:
        import uvicorn  # noqa: F401 - looked for before anything is loaded
        import websockets  # noqa: F401 - uvicorn serves no /ws without it

        from posecrafter_rt.serve.app import create_app
    except ModuleNotFoundError as error:
        raise BackendUnavailable(
            f"serving needs the package {error.name}", "pip install 'posecrafter-rt[serve]'"
        ) from error
    return create_app


def _url(host: str, port: int, token: str | None) -> str:
    """Return the page's address. If the server listens at all addresses, it has this machine's name."""
    if host in ("0.0.0.0", "::"):
        host = socket.gethostname()
    shown = f"[{host}]" if ":" in host else host
    return f"http://{shown}:{port}/" + (f"?{urlencode({'token': token})}" if token else "")


def _run(application: FastAPI, listener: socket.socket, on_ready: Callable[[], None]) -> None:
    """Serve until interrupted or terminated. Raises: PoseCrafterError if the avatar cannot be streamed."""
    import uvicorn

    from posecrafter_rt.serve.server import server_config

    class Server(uvicorn.Server):
        async def startup(self, sockets: list[socket.socket] | None = None) -> None:
            await super().startup(sockets)
            # Later collections skip what is there now, which lives as long as the server: each took 90 ms, two frames.
            gc.collect()
            gc.freeze()
            if self.started:
                on_ready()

    before = signal.signal(
        signal.SIGTERM, signal.default_int_handler
    )  # uvicorn raises the signal again when it has ended
    try:
        application.state.service.start()
        Server(server_config(application)).run(sockets=[listener])
    except KeyboardInterrupt:
        return  # this is how a server is ended
    finally:
        gc.unfreeze()
        signal.signal(signal.SIGTERM, before)
