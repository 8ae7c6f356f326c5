"""The pictures of a comparison's report, read back from its page."""

from __future__ import annotations

import base64
import io
import re

import numpy as np
import pyarrow as pa
import pytest
from PIL import Image
from planted import config, finish, plant

from paris_ray.data import schema
from paris_ray.evaluation import compare_captions
from paris_ray.evaluation.arrays import save
from paris_ray.evaluation.compare_pictures import SHOWN, pictures
from paris_ray.evaluation.compare_results import Results
from paris_ray.evaluation.compare_rows import Run
from paris_ray.manifest import MANIFEST
from paris_ray.storage import Folder

CAPTION = "a <fox> & a caption of row {}"


@pytest.fixture
def drawn(tmp_path):
    """Pictures of two rows, of which every third of the main row's shows all that is asked; and a corpus with their captions."""
    mine = config(tmp_path, "rows=[experts, monolith]", "routings=[]")
    plan, _ = finish(mine)
    g, ids = np.random.default_rng(0), [f"row {i}" for i in range(80)]
    run = Folder(mine.folder) / "partitions/kmeans-4"
    table = {"id": ids, "caption": [CAPTION.format(i) for i in range(80)], "split": ["validation"] * 50 + ["held_out"] * 30}
    schema.write_table(run / "corpus", schema.part_name(0), pa.table(table))
    schema.write_table(run / "clusters", "labels.parquet", pa.table({"id": ids, "expert": [0] * 80}))
    (run / "corpus").write_json(MANIFEST, {"counts": {}, "files": [{"name": schema.part_name(0)}]})
    made = {}
    for row in mine.rows:
        for part, count in (("seen", 40), ("held_out", 20)):
            folder = Folder(Run(row, 0, plan.rate(row)).folder(mine)) / plan.drawing(row, plan.guidance(row), part).folder
            made[row, part] = g.integers(0, 256, (count, 8, 8, 3), np.uint8)
            save(folder, "pictures", made[row, part])
            right = (np.arange(count) % 3 == 0) * (row == "experts")
            plant(mine, plan, row, right[:, None].astype(float), "all", part)
    return mine, run, made


def test_a_column_has_its_caption_and_its_pictures_are_marked(drawn):
    mine, run, made = drawn
    tables = re.findall(r"<table.*?</table>", pictures(Results(mine)), re.DOTALL)
    assert len(tables) == 2
    for table, part in zip(tables, ("seen", "held_out"), strict=True):
        asked = [one.caption for one in compare_captions.choose(mine, run, part, SHOWN)]
        heads = re.findall(r"<th>([^<]+)</th>", table)
        assert [one.replace("&lt;", "<").replace("&gt;", ">").replace("&amp;", "&") for one in heads] == asked
        for row in mine.rows:
            (line,) = re.findall(rf"<tr><td>{row}</td>.*?</tr>", table, re.DOTALL)
            found = re.findall(r'<img src="data:image/png;base64,([^"]+)" alt="([^"]+)" class="([^"]+)">', line)
            for i, (content, said, kinds) in enumerate(found):
                assert np.array_equal(np.asarray(Image.open(io.BytesIO(base64.b64decode(content)))), made[row, part][i])
                mark = "right" if row == "experts" and i % 3 == 0 else "wrong"
                assert said == f"{row}, picture {i}, {mark}"
                assert kinds == f"{mark} pixelated"
            assert len(found) == SHOWN == len(heads)


def test_large_pictures_are_smoothed_and_those_that_nobody_judges_are_not_marked(drawn):
    mine, _, _ = drawn
    for way in Results(mine).ways.values():
        save(way.folders[0], "pictures", np.zeros((40, 96, 96, 3), np.uint8))
        way.folders[0].delete("scores.npy")
    seen = pictures(Results(mine)).partition("<h3>")[0]
    assert seen.count("<img ") == 3 * SHOWN  # the monolith with more steps too
    assert "class=" not in "".join(re.findall(r"<img [^>]*>", seen))


def test_nothing_drawn_is_said(tmp_path):
    assert "Nothing is drawn yet." in pictures(Results(config(tmp_path)))
