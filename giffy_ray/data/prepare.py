"""The whole way from an Experiment to its Store: render the built-in videos if need be, list, decode once."""

from __future__ import annotations

import sys
import time

from giffy_ray.config import Experiment
from giffy_ray.data import store as stores
from giffy_ray.data import stream, synthetic
from giffy_ray.data.catalog import Catalog, read_catalog
from giffy_ray.data.store import Store
from giffy_ray.progress import Bar
from giffy_ray.storage import join


def catalog_of(experiment: Experiment) -> Catalog:
    """The videos of `data.root`, or of the built-in data set, which is rendered on first use. Raises ConfigError."""
    if experiment.data.root is not None:
        return read_catalog(experiment.data.root, experiment.data)
    root = synthetic.ensure(join(experiment.storage, "data"), experiment.data.synthetic)
    return read_catalog(root, experiment.data, name=synthetic.NAME)


def prepare(experiment: Experiment) -> Store:
    """Decodes what is not stored yet, and says what was rejected and why. Raises ConfigError."""
    catalog = catalog_of(experiment)
    location = join(experiment.storage, "stores", stores.store_key(catalog, experiment.clip))
    if not stores.is_finished(location):
        began_s = time.perf_counter()
        with Bar(f"decoding {catalog.name}", len(catalog.videos), "videos") as bar:
            stream.fill_store(catalog, experiment.clip, location, bar.advance)
        rate = len(catalog.videos) / (time.perf_counter() - began_s)
        print(f"decoded {len(catalog.videos)} videos at {rate:.0f} a second into {location}")
    store = Store(location)
    if store.rejects:
        counts = ", ".join(f"{count} {reason}" for reason, count in sorted(store.reject_counts().items()))
        print(f"{len(store.rejects)} of {len(catalog.videos)} videos rejected ({counts}):", file=sys.stderr)
        for reject in store.rejects:
            print(f"  {reject['id']}: {reject['reason']}: {reject['detail']}", file=sys.stderr)
    return store
