# Makes a root of the userland $1 with the guest's files $2 and the executables $3, and becomes systemd in it. Process 1 of its
# pid namespace, in mount, cgroup, IPC and UTS namespaces of its own; $4 is its control group.
set -e
# A group with processes in it cannot have controllers for those below. One that this namespace does not know is shown as 0.
tries=0
while grep -q '^0$' "$4/cgroup.procs" && [ $tries -lt 500 ]; do
    usleep 20000
    tries=$((tries + 1))
done
mount -t tmpfs -o mode=755 tmpfs /mnt
mkdir /mnt/upper /mnt/work /mnt/root
# What is written is gone with the namespace.
mount -t overlay -o "lowerdir=$1,upperdir=/mnt/upper,workdir=/mnt/work" overlay /mnt/root
cd /mnt/root
mkdir -p dev etc/ozone etc/systemd/system guest mnt proc root run srv sys tmp usr/local/bin var/lib var/log var/tmp
mkdir -p etc/systemd/system/sysinit.target.wants etc/systemd/system/sockets.target.wants
ln -s /lib/systemd/system/systemd-journald.service etc/systemd/system/sysinit.target.wants/
ln -s /lib/systemd/system/systemd-journald.socket etc/systemd/system/sockets.target.wants/
mount --rbind /dev dev
mount -t proc proc proc
mount -t sysfs sysfs sys
mount -t cgroup2 cgroup2 sys/fs/cgroup
mount -t tmpfs -o mode=755,nosuid,nodev tmpfs run
mount -t tmpfs -o mode=1777,nosuid,nodev tmpfs tmp
mount --bind "$2" guest
mount --bind "$3" usr/local/bin
pivot_root . mnt
cd /
umount -l /mnt
export container=ozone-tests
exec /lib/systemd/systemd --system --unit=basic.target --log-target=console --log-level=notice --show-status=false
