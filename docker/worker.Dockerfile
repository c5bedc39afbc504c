# Intake and worker. The torch wheel brings its own CUDA libraries: the host needs the NVIDIA
# driver and its container toolkit, no CUDA base image. Without a GPU the same image runs on the
# CPU (docker-compose.cpu.yml).
FROM python:3.11-slim

# The largest layer and the one that changes least. It stays out of the lock, see the Makefile.
RUN pip install --no-cache-dir torch==2.13.0

COPY requirements/worker.lock /build/
RUN pip install --no-cache-dir --require-hashes -r /build/worker.lock

COPY pyproject.toml README.md LICENSE /build/
COPY server /build/server
COPY worker /build/worker
COPY engine /build/engine
COPY jobs /build/jobs
COPY cli /build/cli
RUN pip install --no-cache-dir --no-deps /build && rm -r /build

# A new volume on /state takes over this folder's owner.
RUN useradd --create-home --uid 1000 freight && install -d -o freight -g freight /state
USER freight
ENV FREIGHT_STATE_DIR=/state
VOLUME /state
CMD ["freight", "worker"]
