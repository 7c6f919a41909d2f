"""giffy_ray generates the video between two images, and trains and tunes the models that do so.

The path of a training sample:

    videos --data.catalog--> catalog: id, path, category, split
    video --data.decode (Ray Data tasks)--> clip, uint8 [30, 64, 64, 3] --data.shards--> memory-mapped cache
    sample index --data.sampler, data.loader (Ray Data)--> batch, uint8 [batch, 30, 64, 64, 3], on each worker
    batch --Learner.update (Ray Train, DDP)--> losses --tracking--> MLflow

The path of a generated clip:

    start, end, noise --Learner.generate--> clip, uint8 --evaluation--> metrics per clip id, tables, pictures, HTML

`tuning` repeats the training with Ray Tune and Optuna, and `workflows` combines all of this for the jobs. Importing the
package imports neither torch nor Ray.
"""
