"""giffy_ray makes the video between two images.

The way of a sample:

    folder of videos ──catalog──> rows: id, path, category, split
    row ──decode (Ray Data tasks)──> Clip, uint8 [30, 64, 64, 3] ──store──> decoded once, memory-mapped
    position in the sample stream ──stream (Ray Data)──> uint8 batch on each worker
    batch ──learner.update (Ray Train, DDP)──> losses ──tracking──> MLflow
    start, end, noise ──learner.generate──> made clip ──evaluate──> metrics by clip id ──render──> pictures

Ray Tune with Optuna (tune) runs that training many times. Importing this package imports neither torch nor ray.
"""
