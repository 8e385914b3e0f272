# One static executable and nothing else.
FROM scratch
ARG NAME
COPY --chmod=0755 ${NAME} /app
USER 65532:65532
ENTRYPOINT ["/app"]
