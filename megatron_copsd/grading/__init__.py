"""Reading a final answer and telling whether it is right: for rewards and for evaluation."""
