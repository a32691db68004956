"""The runner on lmms-eval: models x techniques x tasks -> result files -> report."""
