"""Runs: the folder (`store`), the loop (`engine`), `workers`, draws (`sampling`), measuring, what it costs (`plan`)."""
