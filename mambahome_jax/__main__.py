"""`python -m mambahome_jax COMMAND`."""

from mambahome_jax.cli import main

if __name__ == "__main__":
    main()
