# The HTTP side: no torch, no model, small.
FROM python:3.11-slim

# Dependencies first: the layer stays while only code changes.
COPY requirements/server.lock /build/
RUN pip install --no-cache-dir --require-hashes -r /build/server.lock

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
ENV FREIGHT_STATE_DIR=/state FREIGHT_HOST=0.0.0.0 FREIGHT_PORT=8000
VOLUME /state
EXPOSE 8000
CMD ["freight", "server"]
