# syntax=docker/dockerfile:1
ARG PYTHON=3.11

FROM ghcr.io/astral-sh/uv:0.13 AS uv

FROM python:${PYTHON}-slim AS build
COPY --from=uv /uv /usr/local/bin/uv
ENV UV_COMPILE_BYTECODE=1 UV_LINK_MODE=copy UV_PYTHON_DOWNLOADS=never UV_PROJECT_ENVIRONMENT=/app
WORKDIR /build
# The dependencies first: they change less often than the code, and so stay in the layer cache.
COPY pyproject.toml uv.lock README.md LICENSE ./
RUN --mount=type=cache,target=/root/.cache/uv uv sync --frozen --no-dev --no-install-project
COPY src src
RUN --mount=type=cache,target=/root/.cache/uv uv sync --frozen --no-dev --no-editable

FROM python:${PYTHON}-slim
RUN useradd --system --uid 10001 --no-create-home --home-dir /data headwater \
    && install -d -o headwater -g headwater -m 700 /data
COPY --from=build /app /app
# Inside a container the network is the container's own; without HEADWATER_ACCESS_TOKEN the server refuses to start.
ENV PATH=/app/bin:$PATH PYTHONUNBUFFERED=1 HEADWATER_DATA_DIR=/data HOST=0.0.0.0 PORT=5000
USER headwater
WORKDIR /data
VOLUME /data
EXPOSE 5000
STOPSIGNAL SIGTERM
HEALTHCHECK --interval=10s --timeout=5s --start-period=20s \
    CMD ["python", "-c", "import os, urllib.request as u; u.urlopen(f'http://127.0.0.1:{os.environ[\"PORT\"]}/readyz', timeout=3)"]
ENTRYPOINT ["headwater"]
CMD ["server"]
