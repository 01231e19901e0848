"""Files that survive kills, full disks and power cuts.

publish         the one way to publish a file or directory: beside, sync, rename
json_files      JSON and JSONL: read, written whole, a line appended
digest          SHA-256 of bytes, of a file, of JSON
lock            one run at a time in a work directory
checkpoints     the newest states of a run, by Orbax
fingerprint     a number for each array, by which a flipped bit shows
orbax_messages  Orbax without what it prints besides what it raises
confinement     files of a model directory are taken from inside it only
cache           where what can be made again is kept between runs
"""
