# The operator. The trainer's image is trainer_image/Dockerfile.
ARG BASE_IMAGE=debian:bookworm-slim

FROM ${BASE_IMAGE} AS environment
RUN apt-get update \
 && apt-get install --yes --no-install-recommends python3 python3-venv \
 && rm -rf /var/lib/apt/lists/*
COPY requirements/operator.txt /build/operator.txt
RUN python3 -m venv /opt/venv \
 && /opt/venv/bin/pip install --no-cache-dir --disable-pip-version-check --requirement /build/operator.txt \
 && /opt/venv/bin/pip uninstall --yes --quiet pip setuptools \
 && python3 -m compileall -q /opt/venv

# A stage of its own, so that a changed line doesn't make the environment's layers anew.
FROM environment AS sources
COPY operator/qlorajob /opt/qlora/qlorajob
COPY operator/qlora_vram /opt/qlora/qlora_vram
COPY operator/qlora_operator /opt/qlora/qlora_operator
RUN python3 -m compileall -q /opt/qlora

FROM ${BASE_IMAGE}
RUN command -v python3 > /dev/null || { \
      apt-get update \
      && apt-get install --yes --no-install-recommends python3 ca-certificates \
      && rm -rf /var/lib/apt/lists/*; }
COPY --from=environment /opt/venv /opt/venv
COPY --from=sources /opt/qlora /opt/qlora
# kopf asks for the name of its user, and 65532 (or whatever the cluster assigns) has none in /etc/passwd.
ENV USER=qlora \
    PATH=/opt/venv/bin:$PATH \
    PYTHONPATH=/opt/qlora \
    PYTHONDONTWRITEBYTECODE=1 \
    PYTHONUNBUFFERED=1
WORKDIR /opt/qlora
USER 65532:65532
EXPOSE 8080 9401
ENTRYPOINT ["python3", "-m", "kopf", "run", "-m", "qlora_operator.handlers"]
CMD ["--standalone", "--all-namespaces", "--log-format=json", "--liveness=http://0.0.0.0:8080/healthz"]
