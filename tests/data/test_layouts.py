from decimal import Decimal

import pytest

from giffy_ray.config import ConfigError
from giffy_ray.data.layouts import (
    Row,
    Spellings,
    class_folders,
    is_kinetics,
    is_list,
    kinetics,
    manifest,
    moments_in_time,
    records_of,
    source_of,
    split_folders,
    ucf101,
)


def of_csv(text: str) -> list[Row]:
    return manifest("my.csv", *records_of(text, "my.csv"))


@pytest.mark.parametrize(
    ("path", "source"),
    [
        ("Archery/v_Archery_g07_c03.avi", "v_Archery_g07"),
        ("UCF-101/HandstandPushups/v_HandStandPushups_g25_c07.avi", "v_HandStandPushups_g25"),
        ("train/ski jumping/-_abcDEF123_000012_000022.mp4", "-_abcDEF123"),
        ("ski_jumping/-_abcDEF123_000100_000110.mkv", "-_abcDEF123"),
        ("erupting/yt-h0_x-Yz12_3_41.mp4", "yt-h0_x-Yz12_3"),
        ("erupting/flickr-2-3-4-1-8-23418_12.mp4", "flickr-2-3-4-1-8-23418"),
        ("erupting/lava_12.mp4", "erupting/lava_12"),  # nothing says that _12 is the number of a cut
        ("erupting/lava.mp4", "erupting/lava"),
        ("erupting/lava.avi", "erupting/lava"),
        ("a.b/lava", "a.b/lava"),
        ("lava.mp4", "lava"),
    ],
)
def test_the_source_of_a_name(path: str, source: str):
    assert source_of(path) == source


def test_a_manifest_says_all_or_only_path_and_category():
    assert of_csv(
        "category, path,source,split,notes\n"
        'skiing,"x/a, b.mp4",day 1,training,good\n'
        "skiing,./x//c.mp4,day 1,Val,\n"
        "\n"
        "erupting,yt-q_1.mp4,,,\n"
    ) == [
        Row("x/a, b.mp4", "skiing", "training", "day 1"),
        Row("x/c.mp4", "skiing", "validation", "day 1"),
        Row("yt-q_1.mp4", "erupting", None, "yt-q"),
    ]
    assert of_csv("path,category\r\na.mp4,x\r\n") == [Row("a.mp4", "x", None, "a")]


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
def test_the_splits_of_a_manifest(name: str, split: str):
    assert of_csv(f"path,category,split\na.mp4,x,{name}\n") == [Row("a.mp4", "x", split, "a")]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "my.csv: no column 'path', only none; add it"),
        ("file,category\na.mp4,x\n", "my.csv: no column 'path', only 'file', 'category'; add it"),
        ("path,class\na.mp4,x\n", "my.csv: no column 'category', only 'path', 'class'; add it"),
        ("path,category,split\na.mp4,x,dev\n", "my.csv, row 2: no split 'dev'; known: training, validation"),
        ("path,category\na.mp4,x\nb.mp4,x\n./a.mp4,y\n", "my.csv, row 4: './a.mp4' is in row 2 already; leave"),
        ("path,category\n/etc/a.mp4,x\n", "my.csv, row 2: '/etc/a.mp4' is no path of a file below the folder"),
        ("path,category\n//etc/a.mp4,x\n", "row 2: '//etc/a.mp4' is no path"),
        ("path,category\nb.mp4,x\nx/../../a.mp4,x\n", "row 3: 'x/../../a.mp4' is no path"),
        ("path,category\n..,x\n", "row 2: '..' is no path"),
        ("path,category\ns3://bucket/a.mp4,x\n", "row 2: 's3://bucket/a.mp4' is no path"),
        ("path,category\n,x\n", "row 2: '' is no path"),
        ("path,category\n\0a.mp4,x\n", "is no path"),
        ("path,category\na.mp4\n", "row 2: 'a.mp4' has no category; give it one"),
        (f"path,category\n{'a' * 200_000},x\n", "my.csv, row 2: field larger than field limit"),
    ],
)
def test_a_manifest_that_is_refused(text: str, message: str):
    with pytest.raises(ConfigError) as refused:
        of_csv(text)
    assert message in str(refused.value)


def test_two_dots_that_stay_below_the_folder_are_taken():
    assert of_csv("path,category\nx/../..a.mp4,x\n") == [Row("..a.mp4", "x", None, "..a")]


def test_the_folders_of_splits():
    names = [
        "extra/skiing/not in a split.mp4",
        "ood/skiing/d.mp4",
        "test/skiing/c.mp4",
        "training/adult+female singing/yt-A_b_7.mp4",
        "training/no category.mp4",
        "validation/skiing/deeper/b.mp4",
    ]
    assert sorted(split_folders(names)) == [
        Row("ood/skiing/d.mp4", "skiing", "ood", "skiing/d"),
        Row("test/skiing/c.mp4", "skiing", "test", "skiing/c"),
        Row("training/adult+female singing/yt-A_b_7.mp4", "adult+female singing", "training", "yt-A_b"),
        Row("validation/skiing/deeper/b.mp4", "skiing", "validation", "skiing/deeper/b"),
    ]


def test_the_lists_of_moments_in_time_v1_and_v2_decide():
    names = ["training/skiing/a.mp4", "training/skiing/unlisted.mp4", "validation/skiing/c.mp4"]
    v1 = "skiing/a.mp4,skiing,3,0\r\nskiing/gone.mp4,skiing,2,1\r\n"
    v2 = 'skiing/a.mp4\n"adult+female/one, two.mp4"\n'
    validation = Row("validation/skiing/c.mp4", "skiing", "validation", "skiing/c")
    assert moments_in_time(names, {"trainingSet.csv": v1}) == [
        Row("training/skiing/a.mp4", "skiing", "training", "skiing/a"),
        Row("training/skiing/gone.mp4", "skiing", "training", "skiing/gone"),
        validation,
    ]
    assert moments_in_time(names, {"trainingSet.csv": v2}) == [
        Row("training/skiing/a.mp4", "skiing", "training", "skiing/a"),
        Row("training/adult+female/one, two.mp4", "adult+female", "training", "adult+female/one, two"),
        validation,
    ]
    assert moments_in_time([], {"validationSet.csv": "skiing/c.mp4,skiing\nskiing/c.mp4,skiing\n"}) == [validation]
    assert moments_in_time(names, {}) == []


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("name,label\nskiing/a.mp4,skiing\n", "trainingSet.csv, row 1: 'name' is not 'category/file.mp4'"),
        ("skiing/a.mp4\n../../secret.mp4\n", "trainingSet.csv, row 2: '../../secret.mp4' is no path"),
    ],
)
def test_a_list_of_moments_in_time_that_is_refused(text: str, message: str):
    with pytest.raises(ConfigError) as refused:
        moments_in_time([], {"trainingSet.csv": text})
    assert message in str(refused.value)


def test_folders_train_and_val_are_splits_but_a_class_named_train_is_none():
    assert split_folders(["train/skiing/a.mp4", "val/skiing/b.mp4"]) == [
        Row("train/skiing/a.mp4", "skiing", "training", "skiing/a"),
        Row("val/skiing/b.mp4", "skiing", "validation", "skiing/b"),
    ]
    assert split_folders(["train/steam/a.mp4", "bus/red/b.mp4"]) == []
    assert split_folders(["test/steam/a.mp4", "bus/red/b.mp4"]) == []


UCF_NAMES = ["Archery/v_Archery_g01_c01.avi", "Archery/v_Archery_g08_c01.avi", "Archery/v_Archery_g26_c01.avi"]
UCF_LISTS = {
    "ucfTrainTestlist/trainlist01.txt": "Archery/v_Archery_g08_c01.avi 1\r\nArchery/v_Archery_g09_c01.avi 1\r\n",
    "ucfTrainTestlist/testlist01.txt": "Archery/v_Archery_g01_c01.avi\r\n\r\n",
    "trainlist02.txt": "Archery/v_Archery_g01_c01.avi 1\n",
    "testlist02.txt": "Archery/v_Archery_g08_c01.avi\n",
}


def test_ucf101_is_what_the_chosen_lists_say():
    assert ucf101(UCF_NAMES, UCF_LISTS, 1) == [
        Row("Archery/v_Archery_g08_c01.avi", "Archery", "training", "v_Archery_g08"),
        Row("Archery/v_Archery_g09_c01.avi", "Archery", "training", "v_Archery_g09"),  # no such file
        Row("Archery/v_Archery_g01_c01.avi", "Archery", "validation", "v_Archery_g01"),
    ]
    assert ucf101(UCF_NAMES, UCF_LISTS, 2) == [
        Row("Archery/v_Archery_g01_c01.avi", "Archery", "training", "v_Archery_g01"),
        Row("Archery/v_Archery_g08_c01.avi", "Archery", "validation", "v_Archery_g08"),
    ]
    assert ucf101(UCF_NAMES, {}, 1) == []


def test_ucf101_may_lie_in_the_folder_that_its_archive_makes():
    nested = [f"UCF-101/{name}" for name in UCF_NAMES]
    assert [row.id for row in ucf101(nested, UCF_LISTS, 2)] == nested[:2]


@pytest.mark.parametrize(
    ("changes", "number", "message"),
    [
        ({}, 3, "data.ucf101_list: trainlist03.txt is not there (value 3)"),
        ({"trainlist02.txt": "a.avi 1\n"}, 2, "trainlist02.txt, row 1: 'a.avi 1' is not 'Class/v_Class_g01_c01.avi'"),
        ({"trainlist02.txt": "\n../a.avi 1\n"}, 2, "trainlist02.txt, row 2: '../a.avi' is no path"),
        (
            {"testlist02.txt": "Archery/v_Archery_g01_c01.avi\n"},
            2,
            "testlist02.txt, row 1: 'Archery/v_Archery_g01_c01.avi' is in trainlist02.txt too",
        ),
    ],
)
def test_lists_of_ucf101_that_are_refused(changes: dict, number: int, message: str):
    with pytest.raises(ConfigError) as refused:
        ucf101(UCF_NAMES, UCF_LISTS | changes, number)
    assert message in str(refused.value)


KINETICS_HEADER = "label,youtube_id,time_start,time_end,split,is_cc\n"


def test_kinetics_is_found_by_name_wherever_it_lies():
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
    assert kinetics(names, lists) == [
        Row("-flat0000_1_000001_000011.mp4", "riding a bike", "training", "-flat0000_1"),
        Row("riding_a_bike/underscore_000002_000012.mp4", "riding a bike", "training", "underscore"),
        Row("train/riding a bike/inasplit000_000003_000013.webm", "riding a bike", "training", "inasplit000"),
        Row("train/riding a bike/gone_from_yt_000040_000050.mp4", "riding a bike", "training", "gone_from_yt"),
        Row("test/massaging person's head/gone_000000_000010.mp4", "massaging person's head", "test", "gone"),
        Row("val/y/twice000000_000004_000014.mp4", "y", "validation", "twice000000"),
    ]
    assert kinetics(names, {"other.csv": "label,split\nx,train\n"}) == []


def test_a_clip_that_kinetics_lists_twice_is_one_video():
    line = "x,abc,1,11,train,0\n"
    twice = {"train.csv": KINETICS_HEADER + line + line, "train_copy.csv": KINETICS_HEADER + line}
    assert kinetics(["abc_000001_000011.mp4"], twice) == [Row("abc_000001_000011.mp4", "x", "training", "abc")]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("x,abc,1,11,dev,0", "train.csv, row 2: no split 'dev'; known: training"),
        ("x,abc,1,11", "train.csv, row 2: no split ''"),
        ("x,abc,one,11,train,0", "train.csv, row 2: time_start and time_end are not seconds"),
        ("x,abc,1,inf,train,0", "train.csv, row 2: time_start and time_end are not seconds"),
        (",abc,1,11,train,0", "train.csv, row 2: expected a youtube_id and a label"),
        ("../../../secret,abc,1,11,train,0", "train.csv, row 2: 'train/../../../secret/abc_000001_000011.mp4' is no"),
    ],
)
def test_a_list_of_kinetics_that_is_refused(line: str, message: str):
    with pytest.raises(ConfigError) as refused:
        kinetics([], {"train.csv": f"{KINETICS_HEADER}{line}\n"})
    assert message in str(refused.value)


@pytest.mark.parametrize(
    ("header", "expected"),
    [
        (KINETICS_HEADER, True),
        ('"split","label","youtube_id","time_start","time_end"\r\n', True),
        ("youtube_id,time_start,time_end,split\n", False),  # the test lists that keep their labels back
        ("", False),
    ],
)
def test_the_header_of_kinetics(header: str, expected: bool):
    assert is_kinetics(header + "x,abc,1,11,train,0\n") is expected


def test_class_folders_and_a_single_folder():
    assert class_folders(["Archery/v_Archery_g01_c01.avi", "b/deep/er.mp4", "c.mp4"], "holiday") == [
        Row("Archery/v_Archery_g01_c01.avi", "Archery", None, "v_Archery_g01"),
        Row("b/deep/er.mp4", "b", None, "b/deep/er"),
        Row("c.mp4", "holiday", None, "c"),
    ]


def test_only_lists_in_their_places_are_read():
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

PLAIN = [Row("x/a.mp4", "skiing", "training", "day 1"), Row("x/b, c.mp4", "erupting", None, "x/b, c")]


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
def test_a_list_is_read_whatever_wrote_it(text: str):
    assert of_csv(text) == PLAIN


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("file;class\na.mp4;x\n", "my.csv: no column 'path', only 'file', 'class'; add it"),
        ("path\ta category\na.mp4\tx\n", "my.csv: no column 'category', only 'path', 'a category'; add it"),
        ("path,category\na, b.mp4,x\n", "my.csv, row 2: 3 cells, but 2 columns; put a cell that holds ',' in double"),
        ("path,category,path\na.mp4,x,b.mp4\n", "my.csv: 2 columns are named 'path'; rename or remove all but one"),
        ('path,category\na.mp4,x\n"b.mp4,x\nc.mp4,x\n', "my.csv, row 3: a double quote is opened and never closed"),
        ('path,category\na.mp4,x\n"b.mp4,x', "my.csv, row 3: a double quote is opened and never closed"),
        (
            "path,category\nC:\\videos\\a.mp4,x\n",
            "row 2: 'C:\\\\videos\\\\a.mp4' is no path of a file",
        ),
        ("path,category\nc:/videos/a.mp4,x\n", "row 2: 'c:/videos/a.mp4' is no path of a file below the folder"),
        ("path,category\n\\\\server\\a.mp4,x\n", "is no path of a file below the folder"),
        ("path,category\n..\\a.mp4,x\n", "is no path of a file below the folder"),
        ("path,category\nx\\..\\..\\a.mp4,x\n", "is no path of a file below the folder"),
        ('path,category\n" ../a.mp4",x\n', "is no path of a file below the folder"),
        ("path,category\na.mp4, \n", "row 2: 'a.mp4' has no category; give it one"),
        (
            "path,category\nx/a.mp4,x\nx\\a.mp4,x\n",
            r"row 3: 'x\\a.mp4' is in row 2, where it is spelled 'x/a.mp4', already",
        ),
    ],
)
def test_a_list_that_cannot_be_read_says_what_is_wrong(text: str, message: str):
    with pytest.raises(ConfigError) as refused:
        of_csv(text)
    assert message in str(refused.value)


def of_records(*records: dict) -> list[Row]:
    return manifest("my.parquet", ["path", "category", "split", "source"], enumerate(records, start=1))


@pytest.mark.parametrize(
    ("category", "read"),
    [
        *[("x", "x"), (" x ", "x"), (b"x\xc3\xa9", "x\u00e9"), ("nan", "nan"), ("e\u0301", "\u00e9")],
        *[(7, "7"), (7.0, "7"), (7.5, "7.5"), (True, "True"), (Decimal("7"), "7")],
    ],
)
def test_the_cells_of_a_table_are_text(category: object, read: str):
    missing = float("nan")
    assert of_records({"path": b"a.mp4", "category": category, "split": missing, "source": missing}) == [
        Row("a.mp4", read, None, "a")
    ]


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"path": "a.mp4", "category": float("nan")}, "row 1: 'a.mp4' has no category; give it one"),
        ({"path": "a.mp4", "category": None}, "row 1: 'a.mp4' has no category; give it one"),
        ({"path": float("nan"), "category": "x"}, "row 1: '' is no path"),
        ({"path": "a.mp4", "category": b"\xff"}, r"row 1: the category b'\xff' is not UTF-8 text at byte 0"),
        ({"path": "a.mp4", "category": ["x", "y"]}, "row 1: the category is ['x', 'y']; give one text for each video"),
    ],
)
def test_a_cell_that_is_no_text_is_refused(record: dict, message: str):
    with pytest.raises(ConfigError) as refused:
        of_records(record)
    assert f"my.parquet, {message}" in str(refused.value)


@pytest.mark.parametrize(
    ("name", "found"),
    [
        ("x/a.mp4", "x/a.mp4"),
        ("x\\a.mp4", "x/a.mp4"),
        (" x / a.mp4 ", "x/a.mp4"),
        ("X/A.MP4", "x/a.mp4"),
        ("x//a.mp4", "x/a.mp4"),
        ("e\u0301/o\u0308.mp4", "\u00e9/\u00f6.mp4"),
        ("n\u0303.mp4", "n\u0303.mp4"),  # both are there, and each is meant as it is spelled
        ("\u00f1.mp4", "\u00f1.mp4"),
        ("\u00d1.mp4", None),  # which of the two?
        ("b.mp4", "b.MP4"),
        (" c.mp4", " c.mp4"),
        ("c.mp4", " c.mp4"),
        ("d\\e.mp4", "d\\e.mp4"),
        ("gone.mp4", None),
    ],
)
def test_a_file_is_found_as_it_is_spelled_or_as_the_only_one_alike(name: str, found: str | None):
    names = ["x/a.mp4", "\u00e9/\u00f6.mp4", "n\u0303.mp4", "\u00f1.mp4", "b.MP4", " c.mp4", "d\\e.mp4", "d/e.mp4"]
    assert Spellings(names).find(name) == found


@pytest.mark.parametrize(
    "text",
    [
        "e\u0301te\u0301/a b.mp4;\u00e9t\u00e9;3;0\n\u00e9t\u00e9/gone.mp4;\u00e9t\u00e9;3;0\n",
        "\u00e9t\u00e9\\a b.mp4\t\u00e9t\u00e9\t3\t0\n\u00e9t\u00e9\\gone.mp4\t\u00e9t\u00e9\t3\t0\n",
        "\u00e9t\u00e9/a b.MP4 , \u00e9t\u00e9 , 3 , 0\n\n \u00e9t\u00e9/gone.mp4 , \u00e9t\u00e9 , 3 , 0\n",
        "\u00e9t\u00e9/a b.mp4\n\u00e9t\u00e9/gone.mp4\ne\u0301te\u0301/a b.mp4\n",
    ],
)
def test_the_lists_of_moments_in_time_find_their_files_alike(text: str):
    name = "training/e\u0301te\u0301/a b.mp4"
    listed, gone = moments_in_time([name], {"trainingSet.csv": text})
    assert listed == Row(name, "\u00e9t\u00e9", "training", "e\u0301te\u0301/a b")
    assert (gone.id, gone.category) == ("training/\u00e9t\u00e9/gone.mp4", "\u00e9t\u00e9")


def test_the_lists_of_ucf101_find_their_files_alike():
    lists = {
        "trainlist01.txt": "archery\\v_Archery_g08_c01.avi 1\nArchery/v_Archery_g26_c01.AVI 1\n",
        "testlist01.txt": " Archery/v_archery_g01_c01.avi\n",
    }
    assert [
        (row.id, row.category, row.split) for row in ucf101([f"UCF-101/{name}" for name in UCF_NAMES], lists, 1)
    ] == [
        (f"UCF-101/{UCF_NAMES[1]}", "Archery", "training"),
        (f"UCF-101/{UCF_NAMES[2]}", "Archery", "training"),
        (f"UCF-101/{UCF_NAMES[0]}", "Archery", "validation"),
    ]
    lists["testlist01.txt"] = "Archery/v_Archery_g08_c01.AVI\n"
    with pytest.raises(ConfigError, match=r"testlist01.txt, row 1: 'Archery/v_Archery_g08_c01.avi' is in trainlist01"):
        ucf101(UCF_NAMES, lists, 1)


@pytest.mark.parametrize("delimiter", [",", ";", "\t", ", ", " | "])
def test_kinetics_is_read_with_other_delimiters(delimiter: str):
    cells = (
        ["label", "youtube_id", "time_start", "time_end", "split"],
        ["de\u0301ja\u0300 vu", "abc", "1", "11", "train"],
    )
    text = "\n".join(delimiter.join(line) for line in cells)
    assert is_kinetics(text)
    assert kinetics(["x/abc_000001_000011.mp4"], {"train.csv": text}) == [
        Row("x/abc_000001_000011.mp4", "d\u00e9j\u00e0 vu", "training", "abc")
    ]


def test_categories_are_spelled_alike_whatever_the_file_system_does():
    assert class_folders(["e\u0301/a.mp4", "\u00e9/b.mp4"], "x") == [
        Row("e\u0301/a.mp4", "\u00e9", None, "e\u0301/a"),
        Row("\u00e9/b.mp4", "\u00e9", None, "\u00e9/b"),
    ]
    assert {row.category for row in split_folders(["train/e\u0301/a.mp4", "val/\u00e9/b.mp4"])} == {"\u00e9"}


def test_empty_parts_of_a_key_are_no_folders():
    names = ["/a.mp4", "x//b.mp4", "//y/c.mp4"]
    assert [row.category for row in class_folders(names, "here")] == ["here", "x", "y"]
    assert [row.category for row in split_folders(["training//a.mp4", "training//x/b.mp4", "training/x//c.mp4"])] == [
        "x",
        "x",
    ]
