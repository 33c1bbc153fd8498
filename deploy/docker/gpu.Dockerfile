# Image of the learner, the rollout workers and the replicas. Build it from the repository's root:
#   docker build -f deploy/docker/gpu.Dockerfile -t palimpsest-gpu:0.1.0 .
# The wheels of torch and vLLM bring the CUDA libraries; the node brings the driver. vLLM compiles kernels at run time, so
# the image has a C compiler.
FROM python:3.12-bookworm AS build
ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1
RUN python -m venv /opt/palimpsest
COPY requirements/gpu.txt /tmp/requirements.txt
RUN /opt/palimpsest/bin/pip install --no-deps -r /tmp/requirements.txt
COPY . /src
RUN /opt/palimpsest/bin/pip install --no-deps --no-build-isolation /src

FROM python:3.12-slim-bookworm
RUN apt-get update && apt-get install -y --no-install-recommends gcc libc6-dev && rm -rf /var/lib/apt/lists/*
COPY --from=build /opt/palimpsest /opt/palimpsest
ENV PATH=/opt/palimpsest/bin:$PATH PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1
# kernels are compiled into HOME; the container runtime mounts the driver's libraries for these uses
ENV HOME=/tmp NVIDIA_DRIVER_CAPABILITIES=compute,utility
RUN useradd --uid 10001 --no-create-home --shell /usr/sbin/nologin palimpsest
USER 10001:10001
WORKDIR /tmp
