"""The words of OpenAI's API: its requests as ours, and our answers and errors as its own.

What is compatible, and what is not, is in docs/openai.md. No HTTP here: batches from files use the
same words. (Nothing is imported here, so that each part can be imported alone.)
"""
