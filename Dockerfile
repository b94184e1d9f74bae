# The image of shadowsvc. docs/adr/0025 says why Debian and not Alpine, and what the wheels bundle.
#
#   docker build -t shadowsvc .
#   docker run --read-only --cap-drop=ALL -p 8080:8080 -e SHADOWSVC_MQTT__URL=… shadowsvc
#
# Settings come from the environment; secrets best as files (SHADOWSVC_MQTT__PASSWORD_FILE, or all in
# one directory, SHADOWSVC_SECRETS_DIR). It writes to no file, so the root may be read-only.

FROM python:3.13-slim AS build
ENV PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_NO_CACHE_DIR=1 PIP_ROOT_USER_ACTION=ignore
WORKDIR /build
COPY requirements.txt requirements-build.txt ./
# Dependencies first: they change less often than the sources.
RUN python3 -m venv --without-pip /opt/shadowsvc \
    && python3 -m pip --python /opt/shadowsvc/bin/python install --no-compile \
        --require-hashes --only-binary :all: -r requirements.txt \
    && python3 -m venv /opt/build \
    && /opt/build/bin/python -m pip install --require-hashes -r requirements-build.txt
# The pure rooms are compiled (docs/adr/0027). A Python from Debian's packages has its headers apart.
RUN header=$(python3 -c 'import sysconfig; print(sysconfig.get_path("include"))')/Python.h \
    && apt-get update \
    && apt-get install -y --no-install-recommends gcc libc6-dev $([ -e "$header" ] || echo python3-dev) \
    && rm -rf /var/lib/apt/lists/*
COPY pyproject.toml README.md LICENSE ./
COPY src src
# Byte-compiled here, since nothing can be written where it runs. The checks of a .pyc's source are
# left out: the sources cannot change either.
RUN HATCH_BUILD_HOOKS_ENABLE=1 /opt/build/bin/python -m hatchling build -t wheel -d dist \
    && python3 -m pip --python /opt/shadowsvc/bin/python install --no-compile --no-deps dist/*.whl \
    && /opt/shadowsvc/bin/python -m compileall -q -j 0 --invalidation-mode unchecked-hash \
        /opt/shadowsvc/lib

FROM python:3.13-slim
COPY --from=build /opt/shadowsvc /opt/shadowsvc
COPY deploy/image/openssl.cnf /etc/pki/tls/openssl.cnf
# Late, so that another revision leaves the layers above as they are; before a RUN, since podman 4.3
# takes a LABEL from its cache whatever is in its variables.
ARG VERSION=0.1.0
ARG REVISION=unknown
# What installs packages has no work here. It takes no space off the base; it takes away a tool.
RUN python3 -m pip uninstall --yes --quiet --root-user-action=ignore pip
ENV PATH=/opt/shadowsvc/bin:$PATH PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1 SHADOWSVC_LOG__FORMAT=json
LABEL org.opencontainers.image.title="shadowsvc" \
      org.opencontainers.image.description="Keeps the last known state of every MQTT device in Cassandra; acknowledges only what is durable" \
      org.opencontainers.image.licenses="Apache-2.0" \
      org.opencontainers.image.version="${VERSION}" \
      org.opencontainers.image.revision="${REVISION}"
# A number, so that runAsNonRoot can be checked.
USER 10001:10001
EXPOSE 8080
HEALTHCHECK --interval=10s --timeout=5s --start-period=10s CMD ["shadowsvc", "probe", "live"]
# Exec form: the process is number 1 and gets SIGTERM itself.
ENTRYPOINT ["shadowsvc"]
CMD ["run"]
