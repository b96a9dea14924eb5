"""What of a model folder turns text into token ids and ends a response: tokenizer, chat template, stop ids."""
