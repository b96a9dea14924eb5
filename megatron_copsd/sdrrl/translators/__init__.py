"""Who translates: models of the NLLB family, translations that are there already, or the model that is trained."""
