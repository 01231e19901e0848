"""Files that survive kills, full disks and power cuts; in buckets, too.

places          what a user names: a path on a disk or in a bucket
publish         the one way to publish a file or directory: beside, sync, rename
outbox          files that change at every step, written seldom to a bucket
json_files      JSON and JSONL: read, written whole, a line appended
digest          SHA-256 of bytes, of a file, of JSON
lock            one run at a time in a work directory
checkpoints     the newest states of a run, by Orbax
fingerprint     a number for each array, by which a flipped bit shows
orbax_messages  Orbax without what it prints besides what it raises
confinement     files of a model directory are taken from inside it only
cache           where what can be made again is kept between runs
bucket_path     pathlib's methods in a bucket, and what goes wrong there
bucket          files, directories and JSON lines where nothing is renamed
bucket_lock     a lock that a dead owner loses, seen from other machines
download        copies of what is in a bucket, on this machine
orbax_s3        Orbax's arrays in s3://, beside gs://
"""
