from decimal import Decimal

import pytest

from giffy_ray.config import ConfigError
from giffy_ray.data.layouts import (
    PathMatcher,
    VideoEntry,
    infer_source,
    is_kinetics,
    is_list,
    parse_class_folders,
    parse_kinetics,
    parse_manifest,
    parse_moments_in_time,
    parse_records,
    parse_split_folders,
    parse_ucf101,
)


def parse_csv(text: str) -> list[VideoEntry]:
    return parse_manifest("my.csv", *parse_records(text, "my.csv"))


@pytest.mark.parametrize(
    ("path", "source"),
    [
        ("Archery/v_Archery_g07_c03.avi", "v_Archery_g07"),
        ("UCF-101/HandstandPushups/v_HandStandPushups_g25_c07.avi", "v_HandStandPushups_g25"),
        ("train/ski jumping/-_abcDEF123_000012_000022.mp4", "-_abcDEF123"),
        ("ski_jumping/-_abcDEF123_000100_000110.mkv", "-_abcDEF123"),
        ("erupting/yt-h0_x-Yz12_3_41.mp4", "yt-h0_x-Yz12_3"),
        ("erupting/flickr-2-3-4-1-8-23418_12.mp4", "flickr-2-3-4-1-8-23418"),
        ("erupting/lava_12.mp4", "erupting/lava_12"),  # _12 may not be the number of a cut
        ("erupting/lava.mp4", "erupting/lava"),
        ("erupting/lava.avi", "erupting/lava"),
        ("a.b/lava", "a.b/lava"),
        ("lava.mp4", "lava"),
    ],
)
def test_source_is_inferred_from_the_name(path: str, source: str):
    assert infer_source(path) == source


def test_manifest_needs_only_path_and_category():
    assert parse_csv(
        "category, path,source,split,notes\n"
        'skiing,"x/a, b.mp4",day 1,training,good\n'
        "skiing,./x//c.mp4,day 1,Val,\n"
        "\n"
        "erupting,yt-q_1.mp4,,,\n"
    ) == [
        VideoEntry("x/a, b.mp4", "skiing", "training", "day 1"),
        VideoEntry("x/c.mp4", "skiing", "validation", "day 1"),
        VideoEntry("yt-q_1.mp4", "erupting", None, "yt-q"),
    ]
    assert parse_csv("path,category\r\na.mp4,x\r\n") == [VideoEntry("a.mp4", "x", None, "a")]


@pytest.mark.parametrize(
    ("name", "split"),
    [
        ("training", "training"),
        ("train", "training"),
        ("validation", "validation"),
        ("val", "validation"),
        ("valid", "validation"),
        ("test", "test"),
        ("ood", "ood"),
    ],
)
def test_split_names_of_a_manifest_are_recognized(name: str, split: str):
    assert parse_csv(f"path,category,split\na.mp4,x,{name}\n") == [VideoEntry("a.mp4", "x", split, "a")]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "my.csv: no column 'path', only none; add it"),
        ("file,category\na.mp4,x\n", "my.csv: no column 'path', only 'file', 'category'; add it"),
        ("path,class\na.mp4,x\n", "my.csv: no column 'category', only 'path', 'class'; add it"),
        ("path,category,split\na.mp4,x,dev\n", "my.csv, row 2: no split 'dev'; use one of training, validation"),
        ("path,category\na.mp4,x\nb.mp4,x\n./a.mp4,y\n", "my.csv, row 4: './a.mp4' is already in row 2; remove one"),
        ("path,category\n/etc/a.mp4,x\n", "my.csv, row 2: '/etc/a.mp4' is not a file below the dataset's folder"),
        ("path,category\n//etc/a.mp4,x\n", "row 2: '//etc/a.mp4' is not a file"),
        ("path,category\nb.mp4,x\nx/../../a.mp4,x\n", "row 3: 'x/../../a.mp4' is not a file"),
        ("path,category\n..,x\n", "row 2: '..' is not a file"),
        ("path,category\ns3://bucket/a.mp4,x\n", "row 2: 's3://bucket/a.mp4' is not a file"),
        ("path,category\n,x\n", "row 2: '' is not a file"),
        ("path,category\n\0a.mp4,x\n", "is not a file"),
        ("path,category\na.mp4\n", "row 2: 'a.mp4' has no category; give it one"),
        (f"path,category\n{'a' * 200_000},x\n", "my.csv, row 2: field larger than field limit"),
    ],
)
def test_invalid_manifest_is_rejected(text: str, message: str):
    with pytest.raises(ConfigError) as error:
        parse_csv(text)
    assert message in str(error.value)


def test_two_dots_within_the_folder_are_accepted():
    assert parse_csv("path,category\nx/../..a.mp4,x\n") == [VideoEntry("..a.mp4", "x", None, "..a")]


def test_split_folders_are_parsed():
    names = [
        "extra/skiing/not in a split.mp4",
        "ood/skiing/d.mp4",
        "test/skiing/c.mp4",
        "training/adult+female singing/yt-A_b_7.mp4",
        "training/no category.mp4",
        "validation/skiing/deeper/b.mp4",
    ]
    assert sorted(parse_split_folders(names)) == [
        VideoEntry("ood/skiing/d.mp4", "skiing", "ood", "skiing/d"),
        VideoEntry("test/skiing/c.mp4", "skiing", "test", "skiing/c"),
        VideoEntry("training/adult+female singing/yt-A_b_7.mp4", "adult+female singing", "training", "yt-A_b"),
        VideoEntry("validation/skiing/deeper/b.mp4", "skiing", "validation", "skiing/deeper/b"),
    ]


def test_lists_of_moments_in_time_v1_and_v2_are_authoritative():
    names = ["training/skiing/a.mp4", "training/skiing/unlisted.mp4", "validation/skiing/c.mp4"]
    v1 = "skiing/a.mp4,skiing,3,0\r\nskiing/gone.mp4,skiing,2,1\r\n"
    v2 = 'skiing/a.mp4\n"adult+female/one, two.mp4"\n'
    validation = VideoEntry("validation/skiing/c.mp4", "skiing", "validation", "skiing/c")
    assert parse_moments_in_time(names, {"trainingSet.csv": v1}) == [
        VideoEntry("training/skiing/a.mp4", "skiing", "training", "skiing/a"),
        VideoEntry("training/skiing/gone.mp4", "skiing", "training", "skiing/gone"),
        validation,
    ]
    assert parse_moments_in_time(names, {"trainingSet.csv": v2}) == [
        VideoEntry("training/skiing/a.mp4", "skiing", "training", "skiing/a"),
        VideoEntry("training/adult+female/one, two.mp4", "adult+female", "training", "adult+female/one, two"),
        validation,
    ]
    assert parse_moments_in_time([], {"validationSet.csv": "skiing/c.mp4,skiing\nskiing/c.mp4,skiing\n"}) == [
        validation
    ]
    assert parse_moments_in_time(names, {}) == []


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("name,label\nskiing/a.mp4,skiing\n", "trainingSet.csv, row 1: 'name' is not 'category/file.mp4'"),
        ("skiing/a.mp4\n../../secret.mp4\n", "trainingSet.csv, row 2: '../../secret.mp4' is not a file"),
    ],
)
def test_invalid_list_of_moments_in_time_is_rejected(text: str, message: str):
    with pytest.raises(ConfigError) as error:
        parse_moments_in_time([], {"trainingSet.csv": text})
    assert message in str(error.value)


def test_train_and_val_are_splits_but_a_class_named_train_is_not():
    assert parse_split_folders(["train/skiing/a.mp4", "val/skiing/b.mp4"]) == [
        VideoEntry("train/skiing/a.mp4", "skiing", "training", "skiing/a"),
        VideoEntry("val/skiing/b.mp4", "skiing", "validation", "skiing/b"),
    ]
    assert parse_split_folders(["train/steam/a.mp4", "bus/red/b.mp4"]) == []
    assert parse_split_folders(["test/steam/a.mp4", "bus/red/b.mp4"]) == []


UCF_NAMES = ["Archery/v_Archery_g01_c01.avi", "Archery/v_Archery_g08_c01.avi", "Archery/v_Archery_g26_c01.avi"]
UCF_LISTS = {
    "ucfTrainTestlist/trainlist01.txt": "Archery/v_Archery_g08_c01.avi 1\r\nArchery/v_Archery_g09_c01.avi 1\r\n",
    "ucfTrainTestlist/testlist01.txt": "Archery/v_Archery_g01_c01.avi\r\n\r\n",
    "trainlist02.txt": "Archery/v_Archery_g01_c01.avi 1\n",
    "testlist02.txt": "Archery/v_Archery_g08_c01.avi\n",
}


def test_ucf101_uses_the_selected_lists():
    assert parse_ucf101(UCF_NAMES, UCF_LISTS, 1) == [
        VideoEntry("Archery/v_Archery_g08_c01.avi", "Archery", "training", "v_Archery_g08"),
        VideoEntry("Archery/v_Archery_g09_c01.avi", "Archery", "training", "v_Archery_g09"),  # no such file
        VideoEntry("Archery/v_Archery_g01_c01.avi", "Archery", "validation", "v_Archery_g01"),
    ]
    assert parse_ucf101(UCF_NAMES, UCF_LISTS, 2) == [
        VideoEntry("Archery/v_Archery_g01_c01.avi", "Archery", "training", "v_Archery_g01"),
        VideoEntry("Archery/v_Archery_g08_c01.avi", "Archery", "validation", "v_Archery_g08"),
    ]
    assert parse_ucf101(UCF_NAMES, {}, 1) == []


def test_ucf101_may_be_in_the_folder_of_its_archive():
    nested = [f"UCF-101/{name}" for name in UCF_NAMES]
    assert [entry.id for entry in parse_ucf101(nested, UCF_LISTS, 2)] == nested[:2]


@pytest.mark.parametrize(
    ("changes", "number", "message"),
    [
        ({}, 3, "data.ucf101_list: trainlist03.txt is missing (value 3)"),
        ({"trainlist02.txt": "a.avi 1\n"}, 2, "trainlist02.txt, row 1: 'a.avi 1' is not 'Class/v_Class_g01_c01.avi'"),
        ({"trainlist02.txt": "\n../a.avi 1\n"}, 2, "trainlist02.txt, row 2: '../a.avi' is not a file"),
        (
            {"testlist02.txt": "Archery/v_Archery_g01_c01.avi\n"},
            2,
            "testlist02.txt, row 1: 'Archery/v_Archery_g01_c01.avi' is in trainlist02.txt too",
        ),
    ],
)
def test_invalid_lists_of_ucf101_are_rejected(changes: dict, number: int, message: str):
    with pytest.raises(ConfigError) as error:
        parse_ucf101(UCF_NAMES, UCF_LISTS | changes, number)
    assert message in str(error.value)


KINETICS_HEADER = "label,youtube_id,time_start,time_end,split,is_cc\n"


def test_kinetics_finds_files_by_name_in_any_folder():
    names = [
        "-flat0000_1_000001_000011.mp4",
        "riding_a_bike/underscore_000002_000012.mp4",
        "train/riding a bike/inasplit000_000003_000013.webm",
        "train/riding a bike/unlisted000_000003_000013.mp4",
        "val/x/twice000000_000004_000014.mp4",
        "val/y/twice000000_000004_000014.mp4",
    ]
    lists = {
        "kinetics700_train.csv": KINETICS_HEADER
        + "riding a bike,-flat0000_1,1,11,train,0\n"
        + '"riding a bike",underscore,2.0,12.0,train,0\n'
        + "riding a bike,inasplit000,3,13,train,1\n"
        + "riding a bike,gone_from_yt,40,50,train,0\n",
        "validate.csv": "split,time_end,time_start,youtube_id,label\r\nvalidate,14,4,twice000000,y\r\n",
        "test.csv": KINETICS_HEADER + "massaging person's head,gone,0,10,test,0\n",
    }
    assert parse_kinetics(names, lists) == [
        VideoEntry("-flat0000_1_000001_000011.mp4", "riding a bike", "training", "-flat0000_1"),
        VideoEntry("riding_a_bike/underscore_000002_000012.mp4", "riding a bike", "training", "underscore"),
        VideoEntry("train/riding a bike/inasplit000_000003_000013.webm", "riding a bike", "training", "inasplit000"),
        VideoEntry("train/riding a bike/gone_from_yt_000040_000050.mp4", "riding a bike", "training", "gone_from_yt"),
        VideoEntry("test/massaging person's head/gone_000000_000010.mp4", "massaging person's head", "test", "gone"),
        VideoEntry("val/y/twice000000_000004_000014.mp4", "y", "validation", "twice000000"),
    ]
    assert parse_kinetics(names, {"other.csv": "label,split\nx,train\n"}) == []


def test_clip_listed_twice_in_kinetics_is_one_video():
    line = "x,abc,1,11,train,0\n"
    lists = {"train.csv": KINETICS_HEADER + line + line, "train_copy.csv": KINETICS_HEADER + line}
    assert parse_kinetics(["abc_000001_000011.mp4"], lists) == [
        VideoEntry("abc_000001_000011.mp4", "x", "training", "abc")
    ]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("x,abc,1,11,dev,0", "train.csv, row 2: no split 'dev'; use one of training"),
        ("x,abc,1,11", "train.csv, row 2: no split ''"),
        ("x,abc,one,11,train,0", "train.csv, row 2: time_start and time_end are not seconds"),
        ("x,abc,1,inf,train,0", "train.csv, row 2: time_start and time_end are not seconds"),
        (",abc,1,11,train,0", "train.csv, row 2: expected a youtube_id and a label"),
        ("../../../secret,abc,1,11,train,0", "train.csv, row 2: 'train/../../../secret/abc_000001_000011.mp4' is not"),
    ],
)
def test_invalid_list_of_kinetics_is_rejected(line: str, message: str):
    with pytest.raises(ConfigError) as error:
        parse_kinetics([], {"train.csv": f"{KINETICS_HEADER}{line}\n"})
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("header", "expected"),
    [
        (KINETICS_HEADER, True),
        ('"split","label","youtube_id","time_start","time_end"\r\n', True),
        ("youtube_id,time_start,time_end,split\n", False),  # test lists without labels
        ("", False),
    ],
)
def test_header_of_kinetics_is_recognized(header: str, expected: bool):
    assert is_kinetics(header + "x,abc,1,11,train,0\n") is expected


def test_class_folders_and_a_flat_folder_are_parsed():
    assert parse_class_folders(["Archery/v_Archery_g01_c01.avi", "b/deep/er.mp4", "c.mp4"], "holiday") == [
        VideoEntry("Archery/v_Archery_g01_c01.avi", "Archery", None, "v_Archery_g01"),
        VideoEntry("b/deep/er.mp4", "b", None, "b/deep/er"),
        VideoEntry("c.mp4", "holiday", None, "c"),
    ]


def test_lists_are_recognized_by_path():
    assert [
        name
        for name in (
            "trainingSet.csv",
            "kinetics700_train.csv",
            "trainlist01.txt",
            "ucfTrainTestlist/testlist03.txt",
            "ucfTrainTestlist/classInd.txt",
            "readme.txt",
            "skiing/captions.csv",
            "skiing/trainlist01.txt",
        )
        if is_list(name)
    ] == ["trainingSet.csv", "kinetics700_train.csv", "trainlist01.txt", "ucfTrainTestlist/testlist03.txt"]


# --- lists from other programs

PLAIN = [VideoEntry("x/a.mp4", "skiing", "training", "day 1"), VideoEntry("x/b, c.mp4", "erupting", None, "x/b, c")]


@pytest.mark.parametrize(
    "text",
    [
        'path,category,split,source\nx/a.mp4,skiing,train,day 1\n"x/b, c.mp4",erupting,,\n',
        'path, category, split, source\nx/a.mp4, skiing, train, day 1\n"x/b, c.mp4", erupting, ,\n',
        'path , category ,split , source \n x/a.mp4 , skiing , Train , day 1 \n "x/b, c.mp4" , erupting , , \n',
        "path;category;split;source\nx/a.mp4;skiing;train;day 1\nx/b, c.mp4;erupting;;\n",
        "path\tcategory\tsplit\tsource\r\nx/a.mp4\tskiing\ttrain\tday 1\r\nx/b, c.mp4\terupting\r\n",
        "path|category|split|source\nx/a.mp4|skiing|train|day 1\nx/b, c.mp4|erupting||\n",
        '\n"category";"path";"source";"split"\n"skiing";"x/a.mp4";"day 1";"train"\n"erupting";"x/b, c.mp4"\n',
        "sep=;\npath;category;split;source\nx/a.mp4;skiing;train;day 1\n  ;  ;\nx/b, c.mp4;erupting;;\n",
        "path;category;split;source\rx/a.mp4;skiing;train;day 1\rx/b, c.mp4;erupting;;\r",
        r"path;category;split;source" "\n" r"x\a.mp4;skiing;train;day 1" "\n" r".\x\b, c.mp4;erupting;;" "\n",
        ',path,category,split,source,,\n0,x/a.mp4,skiing,train,day 1,,\n1,"x/b, c.mp4",erupting,,,,\n',
    ],
)
def test_lists_of_other_programs_are_read(text: str):
    assert parse_csv(text) == PLAIN


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("file;class\na.mp4;x\n", "my.csv: no column 'path', only 'file', 'class'; add it"),
        ("path\ta category\na.mp4\tx\n", "my.csv: no column 'category', only 'path', 'a category'; add it"),
        (
            "path,category\na, b.mp4,x\n",
            "my.csv, row 2: 3 cells, but 2 columns; put a cell that contains ',' in double",
        ),
        ("path,category,path\na.mp4,x,b.mp4\n", "my.csv: 2 columns are named 'path'; rename or remove all but one"),
        ('path,category\na.mp4,x\n"b.mp4,x\nc.mp4,x\n', "my.csv, row 3: a double quote is opened and never closed"),
        ('path,category\na.mp4,x\n"b.mp4,x', "my.csv, row 3: a double quote is opened and never closed"),
        (
            "path,category\nC:\\videos\\a.mp4,x\n",
            "row 2: 'C:\\\\videos\\\\a.mp4' is not a file",
        ),
        ("path,category\nc:/videos/a.mp4,x\n", "row 2: 'c:/videos/a.mp4' is not a file below the dataset's folder"),
        ("path,category\n\\\\server\\a.mp4,x\n", "is not a file below the dataset's folder"),
        ("path,category\n..\\a.mp4,x\n", "is not a file below the dataset's folder"),
        ("path,category\nx\\..\\..\\a.mp4,x\n", "is not a file below the dataset's folder"),
        ('path,category\n" ../a.mp4",x\n', "is not a file below the dataset's folder"),
        ("path,category\na.mp4, \n", "row 2: 'a.mp4' has no category; give it one"),
        (
            "path,category\nx/a.mp4,x\nx\\a.mp4,x\n",
            r"row 3: 'x\\a.mp4' is already in row 2, where it is spelled 'x/a.mp4'; remove",
        ),
    ],
)
def test_malformed_list_is_rejected_with_the_reason(text: str, message: str):
    with pytest.raises(ConfigError) as error:
        parse_csv(text)
    assert message in str(error.value)


def parse_rows(*records: dict) -> list[VideoEntry]:
    return parse_manifest("my.parquet", ["path", "category", "split", "source"], enumerate(records, start=1))


@pytest.mark.parametrize(
    ("category", "text"),
    [
        *[("x", "x"), (" x ", "x"), (b"x\xc3\xa9", "x\u00e9"), ("nan", "nan"), ("e\u0301", "\u00e9")],
        *[(7, "7"), (7.0, "7"), (7.5, "7.5"), (True, "True"), (Decimal("7"), "7")],
    ],
)
def test_cells_of_a_table_are_converted_to_text(category: object, text: str):
    missing = float("nan")
    assert parse_rows({"path": b"a.mp4", "category": category, "split": missing, "source": missing}) == [
        VideoEntry("a.mp4", text, None, "a")
    ]


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"path": "a.mp4", "category": float("nan")}, "row 1: 'a.mp4' has no category; give it one"),
        ({"path": "a.mp4", "category": None}, "row 1: 'a.mp4' has no category; give it one"),
        ({"path": float("nan"), "category": "x"}, "row 1: '' is not a file"),
        ({"path": "a.mp4", "category": b"\xff"}, r"row 1: the category b'\xff' is not UTF-8 text at byte 0"),
        ({"path": "a.mp4", "category": ["x", "y"]}, "row 1: the category is ['x', 'y']; give one text per video"),
    ],
)
def test_cell_that_is_not_text_is_rejected(record: dict, message: str):
    with pytest.raises(ConfigError) as error:
        parse_rows(record)
    assert f"my.parquet, {message}" in str(error.value)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("x/a.mp4", "x/a.mp4"),
        ("x\\a.mp4", "x/a.mp4"),
        (" x / a.mp4 ", "x/a.mp4"),
        ("X/A.MP4", "x/a.mp4"),
        ("x//a.mp4", "x/a.mp4"),
        ("e\u0301/o\u0308.mp4", "\u00e9/\u00f6.mp4"),
        ("n\u0303.mp4", "n\u0303.mp4"),  # both exist, so the exact name decides
        ("\u00f1.mp4", "\u00f1.mp4"),
        ("\u00d1.mp4", None),  # ambiguous
        ("b.mp4", "b.MP4"),
        (" c.mp4", " c.mp4"),
        ("c.mp4", " c.mp4"),
        ("d\\e.mp4", "d\\e.mp4"),
        ("gone.mp4", None),
    ],
)
def test_path_matcher_prefers_exact_names_and_needs_unique_equivalents(name: str, expected: str | None):
    names = ["x/a.mp4", "\u00e9/\u00f6.mp4", "n\u0303.mp4", "\u00f1.mp4", "b.MP4", " c.mp4", "d\\e.mp4", "d/e.mp4"]
    assert PathMatcher(names).find(name) == expected


@pytest.mark.parametrize(
    "text",
    [
        "e\u0301te\u0301/a b.mp4;\u00e9t\u00e9;3;0\n\u00e9t\u00e9/gone.mp4;\u00e9t\u00e9;3;0\n",
        "\u00e9t\u00e9\\a b.mp4\t\u00e9t\u00e9\t3\t0\n\u00e9t\u00e9\\gone.mp4\t\u00e9t\u00e9\t3\t0\n",
        "\u00e9t\u00e9/a b.MP4 , \u00e9t\u00e9 , 3 , 0\n\n \u00e9t\u00e9/gone.mp4 , \u00e9t\u00e9 , 3 , 0\n",
        "\u00e9t\u00e9/a b.mp4\n\u00e9t\u00e9/gone.mp4\ne\u0301te\u0301/a b.mp4\n",
    ],
)
def test_lists_of_moments_in_time_find_equivalent_names(text: str):
    name = "training/e\u0301te\u0301/a b.mp4"
    present, missing = parse_moments_in_time([name], {"trainingSet.csv": text})
    assert present == VideoEntry(name, "\u00e9t\u00e9", "training", "e\u0301te\u0301/a b")
    assert (missing.id, missing.category) == ("training/\u00e9t\u00e9/gone.mp4", "\u00e9t\u00e9")


def test_lists_of_ucf101_find_equivalent_names():
    lists = {
        "trainlist01.txt": "archery\\v_Archery_g08_c01.avi 1\nArchery/v_Archery_g26_c01.AVI 1\n",
        "testlist01.txt": " Archery/v_archery_g01_c01.avi\n",
    }
    assert [
        (entry.id, entry.category, entry.split)
        for entry in parse_ucf101([f"UCF-101/{name}" for name in UCF_NAMES], lists, 1)
    ] == [
        (f"UCF-101/{UCF_NAMES[1]}", "Archery", "training"),
        (f"UCF-101/{UCF_NAMES[2]}", "Archery", "training"),
        (f"UCF-101/{UCF_NAMES[0]}", "Archery", "validation"),
    ]
    lists["testlist01.txt"] = "Archery/v_Archery_g08_c01.AVI\n"
    with pytest.raises(ConfigError, match=r"testlist01.txt, row 1: 'Archery/v_Archery_g08_c01.avi' is in trainlist01"):
        parse_ucf101(UCF_NAMES, lists, 1)


@pytest.mark.parametrize("delimiter", [",", ";", "\t", ", ", " | "])
def test_kinetics_is_read_with_other_delimiters(delimiter: str):
    cells = (
        ["label", "youtube_id", "time_start", "time_end", "split"],
        ["de\u0301ja\u0300 vu", "abc", "1", "11", "train"],
    )
    text = "\n".join(delimiter.join(line) for line in cells)
    assert is_kinetics(text)
    assert parse_kinetics(["x/abc_000001_000011.mp4"], {"train.csv": text}) == [
        VideoEntry("x/abc_000001_000011.mp4", "d\u00e9j\u00e0 vu", "training", "abc")
    ]


def test_categories_are_normalized():
    assert parse_class_folders(["e\u0301/a.mp4", "\u00e9/b.mp4"], "x") == [
        VideoEntry("e\u0301/a.mp4", "\u00e9", None, "e\u0301/a"),
        VideoEntry("\u00e9/b.mp4", "\u00e9", None, "\u00e9/b"),
    ]
    assert {entry.category for entry in parse_split_folders(["train/e\u0301/a.mp4", "val/\u00e9/b.mp4"])} == {"\u00e9"}


def test_empty_parts_of_a_key_are_not_folders():
    names = ["/a.mp4", "x//b.mp4", "//y/c.mp4"]
    assert [entry.category for entry in parse_class_folders(names, "here")] == ["here", "x", "y"]
    assert [
        entry.category for entry in parse_split_folders(["training//a.mp4", "training//x/b.mp4", "training/x//c.mp4"])
    ] == [
        "x",
        "x",
    ]
