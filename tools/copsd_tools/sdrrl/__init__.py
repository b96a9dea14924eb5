"""``copsd sdrrl``: the data of SDRRL and of the supervised baselines."""
