import pytest

from giffy_ray.config import ConfigError
from giffy_ray.data.layouts import (
    Row,
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
        ("shifted", "shifted"),
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
        "shifted/skiing/d.mp4",
        "test/skiing/c.mp4",
        "training/adult+female singing/yt-A_b_7.mp4",
        "training/no category.mp4",
        "validation/skiing/deeper/b.mp4",
    ]
    assert sorted(split_folders(names)) == [
        Row("shifted/skiing/d.mp4", "skiing", "shifted", "skiing/d"),
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
