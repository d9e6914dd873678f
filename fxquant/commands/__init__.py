"""The commands behind `fxquant`: one module a verb, heavy imports inside, so that `--help` answers at once."""
