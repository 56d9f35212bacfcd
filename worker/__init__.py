"""The worker: takes jobs from the queue, fetches and decodes their images, and runs the model.

`worker.queue` is the light part that the API imports too; `worker.media` makes pixels of image
names; `worker.engine` makes text of messages and pixels. Importing this package imports none.
"""
