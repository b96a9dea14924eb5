"""SGLang servers: how fast they sample, and how fast weights reach them."""
