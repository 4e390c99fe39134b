"""mambahome preprocess, as a script."""

from mambahome_jax.cli import script

if __name__ == "__main__":
    script("preprocess")
