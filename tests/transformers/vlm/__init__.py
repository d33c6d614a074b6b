"""Small random vision-language models with the real architectures, built without downloads, and the slow exact path."""
