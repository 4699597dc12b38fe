"""An OpenAI-compatible server in which editing a conversation's history costs by what was removed."""
