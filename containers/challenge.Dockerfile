# docker build -f containers/challenge.Dockerfile --build-context model=RUN/checkpoints/best -t challenge .
# Reads /input, writes /output, and needs no network. BASE: mambahome:cpu where there is no GPU.
ARG BASE=mambahome:cuda
FROM ${BASE}
# `model` is a build context of the command line, not a stage.
# hadolint ignore=DL3022
COPY --from=model . /model
ENTRYPOINT ["mambahome", "infer", "--data_path", "/input", "--model_path", "/model", "--output_dir", "/output", \
            "--split", "all"]
CMD ["--output_format", "mha"]
