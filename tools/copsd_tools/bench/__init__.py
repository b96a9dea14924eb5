"""``copsd bench``: what the loss, packing and servers take, against the other ways of doing the same."""
