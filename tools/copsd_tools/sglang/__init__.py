"""Commands for SGLang's servers: their environment, and running them by themselves."""
