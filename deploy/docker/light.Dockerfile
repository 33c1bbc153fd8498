# Image of the gateway and the store: no torch, no GPU. Build it from the repository's root:
#   docker build -f deploy/docker/light.Dockerfile -t palimpsest-light:0.1.0 .
# env_gateway.code_tools needs bubblewrap.
# reasoning-gym needs pycosat, which has no wheels: the first stage has a C compiler.
FROM python:3.12-bookworm AS build
ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1
RUN python -m venv /opt/palimpsest
COPY requirements/light.txt /tmp/requirements.txt
RUN /opt/palimpsest/bin/pip install --no-deps -r /tmp/requirements.txt
COPY . /src
RUN /opt/palimpsest/bin/pip install "setuptools>=78" && /opt/palimpsest/bin/pip install --no-deps --no-build-isolation /src

FROM python:3.12-slim-bookworm
RUN apt-get update && apt-get install -y --no-install-recommends bubblewrap && rm -rf /var/lib/apt/lists/*
COPY --from=build /opt/palimpsest /opt/palimpsest
ENV PATH=/opt/palimpsest/bin:$PATH PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1
RUN useradd --uid 10001 --no-create-home --shell /usr/sbin/nologin palimpsest
USER 10001:10001
WORKDIR /tmp
