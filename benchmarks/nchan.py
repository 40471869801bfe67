"""nginx with the Nchan module, the C server for this job, from Debian's packages; memory store, one worker."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path
from typing import Final

from benchmarks.parts import Parts, Program
from headwater.dev.services import free_port

PACKAGES: Final = ("nginx-light", "libnginx-mod-nchan")
MODULES: Final = ("/usr/lib/nginx/modules", "/usr/lib64/nginx/modules", "/usr/share/nginx/modules")
CONFIG: Final = """
load_module {module};
daemon off;
{user}
worker_processes 1;
worker_rlimit_nofile {descriptors};
pid {folder}/nginx.pid;
error_log {folder}/error.log warn;
events {{ worker_connections {descriptors}; }}
http {{
    access_log off;
    client_body_temp_path {folder}/body;
    proxy_temp_path {folder}/proxy;
    fastcgi_temp_path {folder}/fastcgi;
    uwsgi_temp_path {folder}/uwsgi;
    scgi_temp_path {folder}/scgi;
    keepalive_requests 100000000;
    keepalive_timeout 600s;
    nchan_shared_memory_size 512M;
    server {{
        listen 127.0.0.1:{port} backlog=4096;
        location = /pub {{
            nchan_publisher http;
            nchan_channel_id $arg_id;
        }}
        location = /sub {{
            nchan_subscriber eventsource;
            nchan_channel_id $arg_id;
            nchan_subscriber_first_message newest;
        }}
    }}
}}
"""


def start(parts: Parts, core: int | None, descriptors: int) -> Program | str:
    """The server, or why there is none."""
    nginx, module = _find()
    if nginx is None or module is None:
        said = _install()
        nginx, module = _find()
        if nginx is None or module is None:
            return said
    port = free_port()
    folder = parts.folder / f"nginx-{port}"
    folder.mkdir()
    # nginx as root would give its worker to a user who may not enter the folder.
    user = "user root;" if os.geteuid() == 0 else ""
    (folder / "nginx.conf").write_text(
        CONFIG.format(module=module, user=user, folder=folder, port=port, descriptors=descriptors)
    )
    return parts.program(
        f"nchan-{port}",
        port,
        [nginx, "-c", str(folder / "nginx.conf"), "-e", str(folder / "error.log")],
        ready=lambda: (folder / "nginx.pid").exists() and bool((folder / "nginx.pid").read_text().strip()),
        core=core,
    )


def _find() -> tuple[str | None, Path | None]:
    places = (Path(folder) / "ngx_nchan_module.so" for folder in MODULES)
    nginx = shutil.which("nginx", path=f"{os.environ.get('PATH', '')}:/usr/sbin")
    return nginx, next((place for place in places if place.exists()), None)


def _install() -> str:
    """Installs it where that is ours to do; says what came of it."""
    if os.geteuid() != 0 or shutil.which("apt-get") is None:
        return f"not installed (apt-get install {' '.join(PACKAGES)})"
    print(f"Nchan is not installed; running apt-get install {' '.join(PACKAGES)} …", flush=True)
    made = subprocess.run(
        ["apt-get", "install", "-y", "--no-install-recommends", *PACKAGES],
        # A packaged nginx starts itself on port 80 unless told not to.
        env={**os.environ, "DEBIAN_FRONTEND": "noninteractive", "RUNLEVEL": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    return "installed" if made.returncode == 0 else f"not installed (apt-get: {made.stderr.strip()[-200:]})"
