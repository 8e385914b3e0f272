# The trainer for daily work: the Python environment and the sources aren't in the image but mounted below /opt/qlora
# (see "The environment in pods" in dev/README.md). The released image is trainer_image/Dockerfile.
ARG BASE=localhost/qlora/base:bookworm
FROM ${BASE}
ENV PYTHONPATH=/opt/qlora/site-packages:/opt/qlora/src/operator:/opt/qlora/src/trainer_image HOME=/tmp
RUN useradd --uid 65532 --user-group --no-create-home --home-dir /tmp --shell /usr/sbin/nologin trainer
USER 65532:65532
ENTRYPOINT ["/usr/bin/python3"]
CMD ["-m", "qlora_trainer"]
