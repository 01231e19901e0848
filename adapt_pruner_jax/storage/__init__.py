"""Files that survive kills, full disks and power cuts.

publish         the one way to publish a file or directory: beside, sync, rename
json_files      JSON and JSONL: read, written whole, a line appended
digest          SHA-256 of bytes, of a file, of JSON
lock            one run at a time in a work directory
checkpoints     the newest states of a run, by Orbax
fingerprint     a number for each array, by which a flipped bit shows
orbax_messages  Orbax without what it prints besides what it raises
confinement     files of a model directory are taken from inside it only
places          what a path or an address means, and whether it is here
bucket_path     paths in a bucket, beside those on a disk
bucket          files and directories in a bucket, where nothing is renamed
bucket_lock     `lock` in a bucket
outbox          files that change at every step, written seldom to a bucket
download        copies of what is in a bucket
orbax_s3        lets Orbax write to S3
cache           where what can be made again is kept between runs
"""
