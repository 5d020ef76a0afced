from stagewise.schedule import Schedule, grid, named_schedule, parse_programs


def test_columns_are_slots_of_time() -> None:
    assert grid(named_schedule("gpipe", 2, 2)) == (
        "device 0  0F0 0F1  .   .  0B1 0B0\n"  #
        "device 1   .  1F0 1F1 1B1 1B0  ."
    )


def test_marked_instructions_stand_between_angles() -> None:
    assert grid(named_schedule("gpipe", 2, 1), [(1, 0), (0, 1)]) == (
        "device 0   0F0    .     .   >0B0<\n"  #
        "device 1    .   >1F0<  1B0    ."
    )


def test_columns_are_positions_where_there_is_no_time() -> None:
    blocked = Schedule(
        name="circle",
        programs=parse_programs("0B0 0F0\n1F0 1B0"),
        placement=((0,), (1,)),
        num_microbatches=1,
    )
    assert grid(blocked) == "device 0  0B0 0F0\ndevice 1  1F0 1B0"


def test_labels_and_cells_are_aligned() -> None:
    lines = grid(named_schedule("1f1b", 11, 12)).splitlines()
    assert lines[0].startswith("device  0   0F0   0F1 ")
    assert lines[10].startswith("device 10    .     .  ")
    column = lines[10].index("10F0")
    assert lines[9][column - 6 : column + 5].split() == ["9F0", "9F1"]
    assert lines[9][column - 6 : column - 3] == "9F0"


def test_a_device_may_have_nothing_to_do() -> None:
    idle = Schedule(
        name="idle",
        programs=(*parse_programs("0F0 0B0"), ()),
        placement=((0,),),
        num_microbatches=1,
    )
    assert grid(idle) == "device 0  0F0 0B0\ndevice 1   .   ."
